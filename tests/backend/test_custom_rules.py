"""Rules of operators that are not torch's own: how they read, run by rows, and go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.plugin_package import offer
from torch_getfuse import api, report
from torch_getfuse.backend.rules import registry
from torch_getfuse.backend.rules.custom import register_rule
from torch_getfuse.errors import OptionError, PluginError
from torch_getfuse.ir import Op, Window

X = torch.rand(1, 4, 12, 10)


def operator(
    name: str, run: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> object:
    made = torch.library.custom_op(f"rules_test::{name}", run, mutates_args=())
    made.register_fake(fake)
    return made


def _clip(x: torch.Tensor, limit: float) -> torch.Tensor:
    return x.clamp(-limit, limit).clone()


def _sum(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one + other


def _conv(data: torch.Tensor, kernel: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return F.conv2d(data, kernel, offset)


def _pool(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 2)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3), keepdim=True)


CLIP = operator("clip", _clip, lambda x, limit: torch.empty_like(x))
SUM = operator("sum", _sum, lambda one, other: torch.empty_like(one + other))
CONV = operator("conv", _conv, lambda *args: torch.empty_like(F.conv2d(*args)))
POOL = operator("pool", _pool, lambda x: torch.empty_like(F.avg_pool2d(x, 2)))
MEAN = operator("mean", _mean, lambda x: torch.empty_like(x.mean((2, 3), keepdim=True)))
ops = torch.ops.rules_test


@pytest.fixture(autouse=True)
def no_rules_left() -> Iterator[None]:
    """What a test registers is gone after it."""
    known = dict(registry.BY_TARGET)
    registry._register_rules_of.cache_clear()
    yield
    registry.BY_TARGET.clear()
    registry.BY_TARGET.update(known)


class Model(nn.Module):
    """A convolution, then what is tried; ``weights`` become parameters."""

    def __init__(self, then: Callable[..., torch.Tensor], *weights: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.then = then
        self.weights = nn.ParameterList([torch.rand(shape) for shape in weights])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = [self.weights[k] for k in range(len(self.weights))]  # as Run does
        return self.then(self.first(x), *weights)


def last(model: nn.Module) -> Op:
    return api.plan(model.eval(), (X,)).graph.ops[-1]


@pytest.mark.parametrize("how", [CLIP, ops.clip, ops.clip.default, "rules_test::clip"])
def test_like_an_operator_of_torch(how: object) -> None:
    model = Model(lambda x: ops.clip(x, 0.5))
    assert last(model).reads[0].window == Window.whole()
    register_rule(how, like="tanh")
    op = last(model)
    assert (op.kind, op.reads[0].window, op.in_place) == (
        "rules_test::clip",
        Window.identity(),
        True,
    )
    assert op.reason == ""
    plan = api.plan(model, (X,))
    y, ledger = api.run_counted(model, (X,), plan)
    torch.testing.assert_close(y, model(X).detach())
    (entry,) = ledger.to_dict()["groups"]
    assert entry["counted_read_bytes"] == entry["planned_read_bytes"] == X.nbytes


def test_like_an_operator_with_other_names_of_arguments() -> None:
    register_rule(CONV, like="conv2d")
    model = Model(ops.conv, (6, 4, 3, 3), (6,))
    op = last(model)
    assert op.reads[0].window == Window.sliding((3, 3))
    assert (op.mixes_channels, op.weight_elements) == (True, 6 * 4 * 9 + 6)
    compiled = torch.compile(model, backend="getfuse", options={"cache": False, "strict": True})
    with torch.no_grad():
        assert torch.equal(compiled(X), model(X))


def test_facts_come_with_the_operator_that_it_is_like() -> None:
    register_rule(CONV, like="conv2d")
    register_rule(SUM, like="matmul")
    register_rule(CLIP, like="view")
    conv, product, clip = (registry.facts_of(f"rules_test::{k}") for k in ("conv", "sum", "clip"))
    assert conv.weights == ("weight", "bias")
    assert conv.named({"data": 1, "kernel": 2, "offset": 3}) == {"input": 1, "weight": 2, "bias": 3}
    assert (product.product, product.batched) == (True, True)
    assert clip.view is None  # it gives a tensor of its own
    assert not any(rule.is_torchs for rule in (conv, product, clip))
    assert registry.facts_of("rules_test::pool") is registry.UNKNOWN


def test_weights_that_are_given_as_tensors_are_weights() -> None:
    """As of torch's own convolution, under whatever names the operator has for them."""
    register_rule(CONV, like="conv2d")
    model = Model(ops.conv, (6, 4, 3, 3), (6,))
    values = {name: value.detach() for name, value in model.named_parameters()}

    def call(x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        made: torch.Tensor = torch.func.functional_call(model, values, (x,))
        return made

    compiled = torch.compile(call, backend="getfuse", options={"cache": False, "strict": True})
    with torch.no_grad():
        compiled(X, values)
    (section,) = report(compiled).sections
    assert section.plan.graph.ops[-1].weight_elements == 6 * 4 * 9 + 6


def test_operands_that_are_broadcast_run_by_rows() -> None:
    register_rule(ops.sum, like="add")
    model = Model(lambda x: ops.sum(x, x.relu()[:, :, :1]))
    plan = api.plan(model.eval(), (X,))
    assert [str(read.window) for read in plan.graph.ops[-1].reads] == ["identity", "whole"]
    y, ledger = api.run_counted(model, (X,), plan)
    torch.testing.assert_close(y, model(X).detach())
    assert "FX nodes" not in " ".join(str(ledger).split())


def test_windows_of_one_input_or_by_argument() -> None:
    register_rule(POOL, windows=Window.sliding((2, 2), (2, 2)))
    model = Model(ops.pool)
    op = last(model)
    assert op.reads[0].window == Window.sliding((2, 2), (2, 2))
    assert (op.in_place, op.mixes_channels) == (False, False)
    plan = api.plan(model, (X,))
    y, ledger = api.run_counted(model, (X,), plan)
    assert torch.equal(y, model(X))
    assert "is not torch's own: its rule says what it reads, not how" in " ".join(
        str(ledger).split()
    )
    register_rule(MEAN, windows=Window.reduce())
    assert last(Model(ops.mean)).reads[0].window == Window.reduce()
    register_rule(CONV, windows={"data": Window.sliding((3, 3))}, mixes_channels=True)
    op = last(Model(ops.conv, (6, 4, 3, 3), (6,)))
    assert (op.reads[0].window, op.mixes_channels) == (Window.sliding((3, 3)), True)
    register_rule(SUM, windows={"one": Window.identity()})
    op = last(Model(lambda x: ops.sum(x, x.relu())))
    assert {read.window for read in op.reads} == {Window.whole()}
    assert op.reason == "no window for 'other' of rules_test::sum"


@pytest.mark.parametrize(
    "wrong",
    [
        Window.identity(),
        Window.sliding((2, 2)),
        Window.sliding((2, 2), (3, 3)),
        Window.transposed((2, 2), (2, 2)),
    ],
)
def test_a_window_that_cannot_be_true_is_not_believed(wrong: Window) -> None:
    register_rule(POOL, windows=wrong)
    op = last(Model(ops.pool))
    assert op.reads[0].window == Window.whole()
    assert "does not give (1, 4, 6, 5)" in op.reason


def test_a_rule_replaces_the_one_before() -> None:
    register_rule(CLIP, windows=Window.whole())
    register_rule(CLIP, like="relu")
    assert last(Model(lambda x: ops.clip(x, 0.5))).reads[0].window == Window.identity()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_rule(torch.ops.aten.relu, like="tanh"), "relu is an operator of torch's"),
        (lambda: register_rule("conv2d", like="tanh"), "conv2d is an operator of torch's own"),
        (lambda: register_rule(CLIP), "takes one of like= and windows="),
        (lambda: register_rule(CLIP, like="rleu"), "like='rleu' .*did you mean 'relu'"),
        (lambda: register_rule(CLIP, like="tanh", windows=Window.whole()), "takes one of"),
        (lambda: register_rule(CLIP, windows="identity"), r"has 'identity'; give Window\.ident"),
        (lambda: register_rule(3, like="tanh"), r"3 is no operator; give torch\.ops\.mylib\.relu"),
    ],
)
def test_wrong_registrations_are_refused(call: Callable[[], None], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_a_package_registers_the_rules_of_its_library_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rules_test_rules.py").write_text(
        "from torch_getfuse import register_rule\n"
        "def register():\n    register_rule('rules_test::clip', like='tanh')\n"
        "def fails():\n    register_rule('rules_test::clip', like='nothing')\n"
    )
    group = "torch_getfuse.rules"
    offer(tmp_path / "good", "good", {group: {"rules_test": "rules_test_rules:register"}})
    offer(tmp_path / "bad", "bad", {group: {"rules_test": "rules_test_rules:fails"}})
    model = Model(lambda x: ops.clip(x, 0.5))
    monkeypatch.syspath_prepend(str(tmp_path))
    with monkeypatch.context() as inner:
        inner.syspath_prepend(str(tmp_path / "bad"))
        api.plan(nn.Conv2d(4, 4, 3).eval(), (X,))  # no operator of the library: nothing is asked
        with pytest.raises(
            PluginError,
            match=r"'rules_test' of the package bad 1\.0 cannot be loaded .*like='nothing' is no",
        ):
            last(model)
    registry._register_rules_of.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path / "good"))
    assert last(model).reads[0].window == Window.identity()
