"""Runs a program every way that the package offers, and holds each against eager.

A program is traced by Dynamo once. The backend of that trace compiles its graph for every
``inner``, and one of them at a time runs when the compiled module is called: so Dynamo's own part,
which is most of the time, is shared. What Dynamo itself gets wrong, or refuses, is not ours: the
graph as traced runs first.
"""

from __future__ import annotations

import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import fx, nn

import torch_getfuse
from torch_getfuse.backend import compiler
from torch_getfuse.errors import NoOperatorError

from .observe import ROUNDINGS, NudgedSums, Observation, difference, nudged, observe
from .program import Case, Program
from .surroundings import (
    NoCrash,
    TorchFailure,
    fast_program_wins,
    memory_filled,
)

TRACED = "traced"
MODES = ("eager", "auto", "depth_first")
"""Values of ``inner`` that are run from one trace."""

CHANGES = ("data.mul_", "copy_", "load_state_dict", "data =", "numpy", "none")
"""How weights are changed between the two calls."""


@dataclass(frozen=True)
class Failure:
    """One way in which a program does not hold.

    Attributes:
        mode: how it ran: ``"eager"``, ``"depth_first"``, ``"split"``, ...
        message: what differs, or the error.
        place: last lines of the package on the stack of an error, so that failures can be sorted.
    """

    mode: str
    message: str
    place: str = ""

    @property
    def kind(self) -> str:
        """What failures of one cause have in common."""
        return f"{self.mode}: {self.place or re.split('[:(]', self.message)[0].strip()}"


@dataclass
class Verdict:
    """What was found of one program.

    Attributes:
        skipped: why it was not checked: torch itself does not compile it; empty if it was.
        failures: what does not hold.
        checked: the ways in which it ran; ``"packed"`` where inner auto had a fast program.
    """

    skipped: str = ""
    failures: list[Failure] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)


def check(program: Program, ways: Collection[str] = ()) -> Verdict:
    """Run a program every way that is asked for.

    Args:
        ways: :data:`MODES`, ``"export"``, ``"split"``, ``"torch.compile"``, ``"run_counted"``,
            ``"training"``; if empty, the modes, and the others for a share of all seeds.
    """
    return check_case(program.load(), program.seed, program.buffer, ways)


def check_case(
    case: Case, seed: int = 0, buffer: str = "1KB", ways: Collection[str] = ()
) -> Verdict:
    """As :func:`check`, for any module."""
    return _Checker(case, seed, buffer, ways).run()


class _Checker:
    def __init__(self, case: Case, seed: int, buffer: str, ways: Collection[str]) -> None:
        self.case, self.seed, self.ways = case, seed, ways
        self.change = weight_change(seed)
        self.options = options_of(seed, buffer)
        self.verdict = Verdict()
        self.modes = [mode for mode in MODES if not ways or mode in ways] or ["eager"]

    def run(self) -> Verdict:
        """Everything, in the order of its cost."""
        rng = Random(self.seed)

        def wants(share: float, *ways: str) -> bool:
            drawn = rng.random() < share
            return any(way in self.ways for way in ways) if self.ways else drawn

        with warnings.catch_warnings(), memory_filled():
            warnings.simplefilter("ignore")
            try:
                self._from_one_trace()
                if wants(0.3, "export", "split"):
                    self._exported()
                if wants(0.1, "torch.compile", "run_counted"):
                    self._public()
                if wants(0.25, "training"):
                    self._gradients()
            except TorchFailure as error:
                self.verdict.skipped = str(error)
        return self.verdict

    # -- one trace, every inner ------------------------------------------------------------

    def _from_one_trace(self) -> None:
        try:
            with torch.no_grad():
                right = self._calls(lambda model: model, self.case.build())
        except Exception as error:
            raise TorchFailure(f"eager: {type(error).__name__}: {_first_line(error)}") from error
        backend = _Backend(self.options, self.modes)
        compiled_for: nn.Module = self.case.build()
        compiled = torch.compile(compiled_for, backend=backend, fullgraph=True, dynamic=False)

        def run(mode: str) -> Sequence[Observation]:
            _start_again(compiled_for, self.case.build())
            backend.mode = mode
            return self._calls(lambda model: compiled, compiled_for)

        with torch.no_grad(), fast_program_wins():
            try:
                traced = run(TRACED)
            except Exception as error:
                raise TorchFailure(
                    f"Dynamo: {type(error).__name__}: {_first_line(error)}"
                ) from error
            for k, (ours, theirs) in enumerate(zip(traced, right)):
                if what := difference(theirs, ours, exact=True):
                    raise TorchFailure(f"Dynamo differs from eager in call {k}: {what}")
            for mode in self.modes:
                self._hold(mode, right, lambda mode=mode: run(mode), exact=mode == "eager")
        if backend.changed:
            self._fail("eager", "the backend changed the graph that it was given")
        if backend.packed:
            self.verdict.checked.add("packed")
        self.plan, self.unplanned = backend.plan, backend.failed
        if self.plan is not None:
            self.verdict.checked.add("plan")
            self._held("plan", lambda: _check_plan(self.plan))

    def _calls(
        self, entry: Callable[[nn.Module], Callable[..., Any]], model: nn.Module
    ) -> list[Observation]:
        """Two calls, weights changed between them; the second one's inputs lie otherwise."""
        found = []
        for k in range(2):
            if k:
                change_weights(model, self.change)
            found.append(observe(entry(model), model, self.case.inputs(k), self.seed))
        return found

    def _hold(
        self,
        mode: str,
        right: Sequence[Observation],
        run: Callable[[], Sequence[Observation]],
        *,
        exact: bool,
    ) -> None:
        """Enter a failure unless ``run`` gives what eager gives."""
        self.verdict.checked.add(mode)
        try:
            found = run()
        except Exception as error:
            self._fail_by(mode, error)
            return
        for k, (theirs, ours) in enumerate(zip(right, found)):
            unsure = None if exact else lambda k=k: self._roundings(k)
            if what := difference(theirs, ours, exact=exact, unsure=unsure):
                self._fail(mode, f"{what} (call {k}, weights changed by {self.change})")
                return

    def _roundings(self, call: int) -> Iterator[Observation]:
        """Eager's call of that number, where everything is off by about a rounding."""
        for way in ROUNDINGS:
            model = nudged(self.case.build, lambda: self.case.inputs(0), way)[0]
            for k in range(call + 1):
                if k:
                    change_weights(model, self.change)
                inputs = nudged(self.case.build, lambda k=k: self.case.inputs(k), way)[1]
                with NudgedSums(way):
                    found = observe(model, model, inputs, self.seed)
            yield found

    # -- other ways in -----------------------------------------------------------------------

    def _exported(self) -> None:
        """``plan`` and ``split`` of an exported program: the same graph, and the same results."""
        model = self.case.build()
        inputs = self.case.inputs(0)
        with torch.no_grad():
            try:
                program = torch.export.export(model, inputs, strict=self.seed % 3 == 0)
                # A program shares weights and buffers with its model.
                plain = program.module(check_guards=False)
                theirs = observe(plain, model, self.case.inputs(0), self.seed)
                fresh = self.case.build()
                right = observe(fresh, fresh, self.case.inputs(0), self.seed)
                if difference(right, theirs, exact=True) or not _takes(program, inputs):
                    return  # torch.export's own
            except Exception:
                return
            try:
                exported = torch_getfuse.plan(program, **self.options)
            except NoOperatorError:
                if self.plan is not None:
                    self._fail("export", "has no operator as exported, but has one as traced")
                return
            except Exception as error:
                self._fail_by("export", error)
                return
            self.verdict.checked.add("export")
            if self.plan is None and self.unplanned:
                pass  # which is a failure already
            elif self.plan is None:
                self._fail("export", "has operators as exported, but none as traced")
            elif exported.graph.fingerprint != self.plan.graph.fingerprint:
                ours, other = ([op.kind for op in p.graph.ops] for p in (self.plan, exported))
                self._fail("export", f"another fingerprint: {other} exported, {ours} traced")

            def split() -> None:
                module = torch_getfuse.split(program, (), exported)
                model.load_state_dict(self.case.build().state_dict())
                found = observe(module, model, self.case.inputs(0), self.seed)
                if what := difference(theirs, found, exact=True):
                    raise AssertionError(what)

            self._held("split", split)

    def _public(self) -> None:
        """What people type: torch.compile by name, plan, run_counted."""
        right_model, model = self.case.build(), self.case.build()
        with torch.no_grad(), fast_program_wins():
            right = self._calls(lambda model: model, right_model)

            def compiled() -> Sequence[Observation]:
                options = {**self.options, "inner": "eager", "strict": True}
                entry = torch.compile(model, backend="getfuse", options=options, dynamic=False)
                return self._calls(lambda _: entry, model)

            self._hold("torch.compile", right, compiled, exact=True)

            def counted() -> None:
                module = self.case.build()
                args = self.case.inputs(0)
                plan = torch_getfuse.plan(self.case.build(), args, **self.options)
                if plan.graph.fingerprint != self.plan.graph.fingerprint:
                    raise AssertionError("plan(model) has another fingerprint than torch.compile")

                def call(*inputs: Any) -> Any:
                    return torch_getfuse.run_counted(module, inputs, plan)[0]

                found = observe(call, module, args, self.seed)
                what = difference(right[0], found, exact=False, unsure=lambda: self._roundings(0))
                if what:
                    raise AssertionError(what)

            if self.plan is not None:
                self._held("run_counted", counted)

    def _gradients(self) -> None:
        """With gradients: results and gradients of inner eager are eager's to the last bit."""
        model = self.case.build()
        if not list(model.parameters()):
            return
        try:
            with NoCrash():
                right = _gradients_of(model, model, self.case.inputs(0), self.seed)
            plain = self.case.build()
            traced = torch.compile(plain, backend="eager", fullgraph=True, dynamic=False)
            same = _gradients_of(traced, plain, self.case.inputs(0), self.seed)
        except Exception:
            return  # eager does not differentiate it, or Dynamo does not
        if difference(right, same, exact=True):
            return

        def run() -> Sequence[Observation]:
            ours = self.case.build()
            options = {**self.options, "inner": "eager", "strict": True}
            entry = torch.compile(ours, backend="getfuse", options=options, dynamic=False)
            return [_gradients_of(entry, ours, self.case.inputs(0), self.seed)]

        self._hold("training", [right], run, exact=True)

    # -- failures ------------------------------------------------------------------------------

    def _held(self, mode: str, run: Callable[[], None]) -> None:
        self.verdict.checked.add(mode)
        try:
            run()
        except AssertionError as error:
            self._fail(mode, str(error))
        except Exception as error:
            self._fail_by(mode, error)

    def _fail(self, mode: str, message: str) -> None:
        self.verdict.failures.append(Failure(mode, message))

    def _fail_by(self, mode: str, error: Exception) -> None:
        self.verdict.failures.append(failure_of(mode, error))


def _takes(program: torch.export.ExportedProgram, inputs: tuple[Any, ...]) -> bool:
    """Whether a program is for the inputs that it was exported with: a strict trace has those that
    change their shape in place as they are left, and refuses them as they were given.
    """
    names = set(program.graph_signature.user_inputs)
    traced = [node.meta["val"] for node in program.graph.nodes if node.name in names]
    pairs = zip(traced, torch.utils._pytree.tree_leaves(inputs), strict=True)
    return all(a.shape == b.shape for a, b in pairs if isinstance(b, torch.Tensor))


def failure_of(mode: str, error: BaseException) -> Failure:
    """An exception where eager runs."""
    seen: set[int] = set()  # torch wraps an error that may name the wrapper as its cause
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "inner_exception", None) or error.__cause__
        if isinstance(error, Warning):
            inner = error.__context__  # an error that the backend has turned into a warning
        error = inner or error
    stack = traceback.extract_tb(error.__traceback__)
    ours = [f for f in stack if "torch_getfuse" in f.filename]
    place = " < ".join(f"{Path(f.filename).name}:{f.name}" for f in reversed(ours[-2:]))
    return Failure(
        mode, f"{type(error).__name__}: {_first_line(error)}", f"{type(error).__name__} {place}"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


class _Backend:
    """A torch.compile backend that compiles a graph for every inner, and runs ``mode`` of them."""

    def __init__(self, options: dict[str, Any], modes: Sequence[str]) -> None:
        self.options, self.modes = options, modes
        self.mode = TRACED
        self.plan: Any = None
        self.failed = False
        self.changed = False
        self.packed = False

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = gm.code
        table: dict[str, Callable[..., Any]] = {TRACED: gm.forward}
        for mode in self.modes:
            options = {**self.options, "inner": mode, "strict": mode != "depth_first"}
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", "torch_getfuse")
                    compiler._warned.clear()
                    table[mode] = compiler.getfuse(gm, inputs, options=options)
                self._keep(getattr(table[mode], "getfuse_record", None))
            except Exception as error:
                table[mode] = _raises(error)
                self.failed = True
        self.changed |= gm.code != before

        def run(*args: Any) -> Any:
            return table[self.mode](*args)

        return run

    def _keep(self, record: Any) -> None:
        """The plan, of a graph that has anything to plan, and whether it runs packed."""
        if record is None:
            return
        section = record.sections[0]
        self.plan = self.plan or section.plan
        self.packed |= any("packed convolutions in" in note for note in section.notes)


def options_of(seed: int, buffer: str) -> dict[str, Any]:
    """The options that a program is planned with, but for ``inner`` and ``strict``."""
    method = Random(f"{seed}/method").choice(("direct", "direct", "direct", "auto"))
    return {"buffer": buffer, "method": method, "budget": 40, "cache": False}


def weight_change(seed: int) -> str:
    """How the weights of the program of a seed are changed."""
    return Random(f"{seed}/change").choice(CHANGES)


def _raises(error: Exception) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise error

    return run


def _check_plan(plan: Any) -> None:
    """A plan verifies, and comes back from its file as it was."""
    plan.verify()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        again = torch_getfuse.load_plan(path)
    again.verify()
    assert again.groups == plan.groups, "other groups after save and load"
    assert again.graph.fingerprint == plan.graph.fingerprint, "another graph after save and load"


def _start_again(model: nn.Module, fresh: nn.Module) -> None:
    """Give a module the parameters and buffers of a fresh one, as other tensors."""
    for mine, other in zip(model.modules(), fresh.modules(), strict=True):
        mine._parameters.update(other._parameters)
        mine._buffers.update(other._buffers)


def change_weights(model, how):  # type: ignore[no-untyped-def] # printed into reproducers
    """Change every floating-point parameter as programs do it: seen by ``_version`` or not."""
    with torch.no_grad():
        if how == "load_state_dict":
            model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
            return
        for p in model.parameters():
            if how == "data.mul_":
                p.data.mul_(1.5)
            elif how == "copy_":
                p.copy_(p * 1.5)
            elif how == "data =":
                p.data = p.data * 1.5
            elif how == "numpy" and p.dtype is torch.float32:
                p.detach().numpy().__imul__(1.5)


def _gradients_of(
    call: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...], seed: int
) -> Observation:
    """A call, and the gradients of what can be differentiated among its results."""
    kept: list[Any] = []

    def recorded(*args: Any) -> Any:
        results = call(*args)
        kept.extend(torch.utils._pytree.tree_leaves(results))
        return results

    seen = observe(recorded, model, inputs, seed)
    model.zero_grad()
    wide = (v for v in kept if isinstance(v, torch.Tensor) and v.requires_grad)
    sum(v.abs().double().square().mean() for v in wide).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            seen.tensors[f"gradient of {name}"] = parameter.grad.clone()
            seen.layout[f"gradient of {name}"] = (parameter.grad.shape, parameter.grad.dtype, ())
    return seen


def check_block(programs: Iterable[Program]) -> Iterator[tuple[Program, Verdict]]:
    """Check programs in turn; what Dynamo keeps of them is dropped after each block."""
    torch._dynamo.reset()
    for program in programs:
        yield program, check(program)
    torch._dynamo.reset()
