"""What changes how operators compute, within the compiled code: autocast, grad mode, vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.testing._internal.two_tensor import TwoTensor

import torch_getfuse
from torch_getfuse.backend.packed import fast

torch.manual_seed(0)
A, B = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
X = torch.randn(2, 3, 8, 8)


def in_one_group(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return A(x).relu()


def ends_within_a_group(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = B(A(x).relu())
    return y.float() * 2


def nested(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = A(x).relu()
        with torch.autocast("cpu", enabled=False):
            z = B(y.float())
        return B(z.relu())


class Attention(nn.Module):
    """As EfficientViT's: views of one map are used before, inside and after an autocast."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enabled = enabled
        self.wide, self.narrow = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = self.wide(x).reshape(x.shape[0], 3, 8, -1).transpose(-1, -2).unbind(1)
            q = torch.relu(q)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
                y = q @ (torch.relu(k).transpose(-1, -2) @ v)
            y = self.narrow(y.float().transpose(-1, -2).reshape(x.shape[0], 8, *x.shape[2:]))
            x = y[:, :3] + x
        return x


def with_gradients(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return B(A(x).relu())


def batched(x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda image: B(A(image[None]).relu())[0])(x)


def written_within_vmap(x: torch.Tensor) -> torch.Tensor:
    """The write goes to a batched tensor, and is read from the tensor that it batches."""
    y = A(x)
    torch.vmap(lambda image: image.mul_(2))(y)
    return B(y)


FUNCTIONS = [in_one_group, ends_within_a_group, nested, with_gradients, batched]


def compile_it(function: Callable[..., Any], **options: object) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="getfuse", options={"strict": True, **options})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_inference(function: Callable[..., torch.Tensor], inner: str) -> None:
    compiled = compile_it(function, inner=inner)
    with torch.no_grad():
        ours, theirs = compiled(X), function(X)
    assert ours.dtype is theirs.dtype
    assert torch.equal(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad
    notes = " ".join(torch_getfuse.report(compiled).sections[-1].notes)
    assert ("traced by AOTAutograd" in notes) == (inner == "aot_eager")


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_views_on_both_sides_of_an_autocast(ambient: bool, enabled: bool, training: bool) -> None:
    """Each operator of its own; two would have had to run before and after the same call."""
    model = Attention(enabled)
    compiled = compile_it(model, inner="eager", buffer=64)
    found = []
    for run in (compiled, model):
        model.zero_grad()
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient)
        with autocast, torch.set_grad_enabled(training):
            y = run(X)
        if training:
            y.float().square().sum().backward()
        found.append((y.detach(), *(p.grad for p in model.parameters())))
        assert torch.is_autocast_enabled("cpu") is False
    assert found[0][0].dtype is found[1][0].dtype
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.fast_program
def test_an_autocast_that_is_off_already_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_times", lambda *_: (0.001, 0.002))  # whatever the clock says
    model = Attention(enabled=False).eval()
    compiled = compile_it(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    (note,) = torch_getfuse.report(compiled).sections[0].notes
    assert "4 packed convolutions" in note
    compiled = compile_it(Attention(enabled=True).eval())
    with torch.no_grad():
        compiled(X)
    (note,) = torch_getfuse.report(compiled).sections[0].notes
    assert note.endswith("autocast, grad mode or the like change within it")


def test_a_mode_that_lasts() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = A(x)
        torch.set_grad_enabled(False)
        return y, B(y.relu())

    for run in (compile_it(function, inner="eager", buffer=64), function):
        with torch.enable_grad():
            first, second = run(X)
            assert first.requires_grad
            assert not second.requires_grad
            assert not torch.is_grad_enabled()


def test_a_weight_that_two_groups_cast_is_told() -> None:
    """Autocast in one piece casts it once, and adds up its gradient before the cast."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return B(B(A(x).relu()).relu())

    compiled = compile_it(twice, inner="eager", buffer=64)
    found = []
    for run in (compiled, twice):
        B.zero_grad()
        run(X).float().square().sum().backward()
        found.append(B.weight.grad)
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    (note,) = torch_getfuse.report(compiled).sections[0].notes
    assert note.startswith("gradients may differ from eager's in the last bit: groups cast ")


@pytest.mark.parametrize("backward", ["auto", False])
@pytest.mark.parametrize("function", FUNCTIONS[:3])
def test_training(function: Callable[..., torch.Tensor], backward: object) -> None:
    """Also where each group is differentiated by its own compiler."""
    compiled = compile_it(function, inner="aot_eager", backward=backward)
    found = []
    for run in (compiled, function):
        A.zero_grad()
        y = run(X)
        y.float().square().sum().backward()
        found.append((y.detach(), A.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert theirs is not None
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_writes_within_vmap_keep_their_place(inner: str) -> None:
    with torch.no_grad():
        ours = compile_it(written_within_vmap, inner=inner, buffer="1KB")(X)
        assert torch.equal(ours, written_within_vmap(X))


def test_attention_whose_mask_is_made_by_vmap() -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return flex_attention(q, q, q) * 2  # type: ignore[no-any-return]

    q = torch.randn(1, 2, 16, 8)
    weights = torch.softmax(q @ q.transpose(-2, -1) / 8**0.5, -1)
    torch.testing.assert_close(compile_it(attend)(q), weights @ q * 2)


# -- exported programs -------------------------------------------------------------------------


class Regions(nn.Module):
    """Regions of an exported program: one in another, two of one name, one without gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = y @ y.transpose(-1, -2)
            with torch.autocast("cpu", enabled=False):
                w = self.linear(z.float())
        with torch.no_grad():
            v = w * 2
            u = v + 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            t = u @ v
        return z.float() * v, u, t


@pytest.mark.parametrize("buffer", [64, 512, "256KB"])
def test_regions_of_an_exported_program(buffer: object) -> None:
    model, x = Regions(), torch.randn(2, 4, 4)
    program = torch.export.export(model, (x,))
    plan = torch_getfuse.plan(model, (x,), buffer=buffer)
    assert torch_getfuse.plan(program, buffer=buffer).graph == plan.graph
    for split in (torch_getfuse.split(model, (x,), plan), torch_getfuse.split(program, (), plan)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                ours, theirs = split(x), model(x)
                assert torch.is_grad_enabled() is grad
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype is b.dtype
                assert torch.equal(a, b)
                assert a.requires_grad == b.requires_grad
    assert torch.is_autocast_enabled("cpu") is False


def test_a_group_takes_its_mode_along() -> None:
    """Handed on alone, it computes what it did."""
    model = Attention(enabled=True).eval()
    split = torch_getfuse.split(model, (X,), torch_getfuse.plan(model, (X,), buffer=64))
    products = [child for _, child in split.named_children() if "matmul.default(" in child.code]
    assert len(products) == 4
    for child in products:
        inputs = child.graph.find_nodes(op="placeholder")
        result = child(*(torch.randn(node.meta["val"].shape) for node in inputs))
        assert result.dtype is torch.bfloat16


# -- tensors of other classes -----------------------------------------------------------------


def test_nested_tensors() -> None:
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    linear = nn.Linear(4, 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(linear(x))

    ours = compile_it(function)(jagged)
    assert torch.equal(ours.values(), function(jagged).values())


@pytest.mark.fast_program
def test_wrapped_tensors_run_as_fx_nodes() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return B(A(x).relu())

    pair = TwoTensor(X.clone(), 2 * X)
    with torch.no_grad():
        compiled = compile_it(function)
        ours, theirs = compiled(pair), function(pair)
        assert isinstance(ours, TwoTensor)
        assert torch.equal(ours.a, theirs.a)
        assert torch.equal(ours.b, theirs.b)
        notes = torch_getfuse.report(compiled).sections[0].notes
        assert "a tensor is of a class or a layout of its own" in notes[0]
        with pytest.raises(Exception, match="'input' is a TwoTensor of no strided rows"):
            compile_it(function, inner="depth_first")(pair)
