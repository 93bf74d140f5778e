"""A failing program as a file that runs on its own and prints ``OK`` or what is wrong."""

from __future__ import annotations

import inspect

from .check import Failure, change_weights, options_of, weight_change
from .program import Program

_TAIL = '''

def seen(call, model, k, back=False):
    """Results, inputs and state after a call."""
    args = inputs(k)
    torch.manual_seed({seed})
    with torch.set_grad_enabled(back):
        results = call(*args)
    leaves = torch.utils._pytree.tree_leaves(results)
    found = [(f"result {{i}}", v) for i, v in enumerate(leaves)]
    found += [(f"input {{i}}", v) for i, v in enumerate(args)]
    found += list(model.named_parameters()) + list(model.named_buffers())
    if back:
        wide = (v for v in leaves if v.requires_grad)
        sum(v.abs().double().square().mean() for v in wide).backward()
        found += [(f"gradient of {{n}}", p.grad) for n, p in model.named_parameters()]
    memory = [v.untyped_storage().data_ptr() for v in (*args, *leaves) if torch.is_tensor(v)]
    first = [memory.index(where) for where in memory]
    return [(n, v.detach().clone() if torch.is_tensor(v) else v) for n, v in found] + [
        ("memory in common", first), ("generator", torch.get_rng_state())]


def compare(right, ours, exact):
    for (name, a), (_, b) in zip(right, ours, strict=True):
        if torch.is_tensor(a) and torch.is_tensor(b):
            same = a.shape == b.shape and a.dtype == b.dtype and torch.allclose(
                a, b, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3, equal_nan=True)
            same = same and (not a.numel() or a.stride() == b.stride())
        else:
            same = a == b
        if not same:
            print("WRONG", name, b, "instead of", a)
            raise SystemExit(1)


{change}

import warnings

import torch_getfuse

options = {options}
model, other = build(), build()
'''

_COMPILED = """
from torch_getfuse.backend.packed import fast
fast._times = lambda *_: (0.001, 0.002)  # inner auto: the fast program, whatever the clock says
options.update(inner={inner!r}, strict={strict})
warnings.filterwarnings("error", "torch_getfuse could not plan")
compiled = torch.compile(other, backend="getfuse", options=options, dynamic=False)
for k in range(2):
    if k:
        change_weights(model, {how!r})
        change_weights(other, {how!r})
    compare(seen(model, model, k, {back}), seen(compiled, other, k, {back}), exact={exact})
"""

_COUNTED = """
plan = torch_getfuse.plan(build(), inputs(0), **options)
def counted(*args): return torch_getfuse.run_counted(other, args, plan)[0]
compare(seen(model, model, 0), seen(counted, other, 0), exact=False)
"""

_EXPORTED = """
with torch.no_grad():
    program = torch.export.export(other, inputs(0), strict={strict})
    exported = torch_getfuse.plan(program, **options)
    try:
        traced = torch_getfuse.plan(build(), inputs(0), **options)
        a, b = ([op.kind for op in p.graph.ops] for p in (exported, traced))
        if exported.graph.fingerprint != traced.graph.fingerprint:
            print("WRONG: fingerprints differ: exported", a, "traced", b)
    except torch_getfuse.GetfuseError as error:
        print("WRONG: planned as exported, but not as traced:", error)
    split = torch_getfuse.split(program, (), exported)
    compare(seen(model, model, 0), seen(split, other, 0), exact=True)
"""

_PLANNED = """
plan = torch_getfuse.plan(model, inputs(0), **options)
plan.verify()
plan.save("/tmp/plan.json")
torch_getfuse.load_plan("/tmp/plan.json").verify()
"""


def reproducer(program: Program, failure: Failure) -> str:
    """The text of the file; its first lines say what was found."""
    head = f"# fuzz seed {program.seed}, {failure.mode}: {failure.message}\n"
    if failure.place:
        head += f"# at {failure.place}\n"
    tail = _TAIL.format(
        seed=program.seed,
        change=inspect.getsource(change_weights),
        options=options_of(program.seed, program.buffer),
    )
    mode = failure.mode
    if mode in ("export", "split"):
        body = _EXPORTED.format(strict=program.seed % 3 == 0)
    elif mode == "run_counted":
        body = _COUNTED
    elif mode == "plan":
        body = _PLANNED
    else:
        inner = mode if mode in ("auto", "depth_first") else "eager"
        body = _COMPILED.format(
            inner=inner,
            strict=inner != "depth_first",
            how="none" if mode == "training" else weight_change(program.seed),
            back=mode == "training",
            exact=inner == "eager",
        )
    return f"{head}{program.source}{tail}{body}print('OK')\n"
