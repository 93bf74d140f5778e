"""Training: gradients, buffers and optimizers as in eager, and the backward graph's own plan."""

from __future__ import annotations

import copy

import pytest
import torch
from texts import one_line
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_getfuse
from torch_getfuse.backend import training
from torch_getfuse.models import calibrate_batch_norm, import_torchvision


class Net(nn.Module):
    """Batch norm, dropout, a skip and two sizes of maps."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3), nn.Hardswish()
        )
        self.head = nn.Conv2d(8, 4, 1)
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        if self.recompute:
            z = checkpoint(self.body, y, use_reentrant=False)
        else:
            z = self.body(y)
        return self.head(nn.functional.max_pool2d(z + y, 2)).mean((2, 3))


def pair(model: nn.Module, **options: object) -> tuple[nn.Module, nn.Module]:
    """Eager and compiled, with weights of their own."""
    settings = {"buffer": "8KB", "strict": True, **options}
    other = copy.deepcopy(model)
    return model, torch.compile(other, backend="getfuse", options=settings)


def steps(model: nn.Module, x: torch.Tensor, count: int = 3) -> list[torch.Tensor]:
    """Losses, then parameters and buffers, after steps of SGD with momentum."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for step in range(count):
        torch.manual_seed(step)
        sgd.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        sgd.step()
        found.append(loss.detach())
    return [*found, *model.parameters(), *model.buffers()]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()

SETTINGS = [
    {"inner": "eager"},
    {"inner": "eager", "backward": True},
    {"inner": "aot_eager"},
    {"inner": "aot_eager", "backward": False},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_three_steps_equal_eager(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    eager, compiled = pair(Net(), **options)
    assert_same(steps(eager, X), steps(compiled, X))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.filterwarnings("ignore:torch_getfuse. fusion_group_. runs eager")
def test_checkpointing_draws_the_same_random_numbers_again(options: dict[str, object]) -> None:
    """``backend="eager"`` of torch raises here, and without the batch norm is silently wrong.

    A group that replays random numbers is one that AOTAutograd cannot trace again, hence not
    strict. Eager updates a checkpointed batch norm twice a step, torch.compile once: its buffers
    are left out.
    """
    torch.manual_seed(0)
    eager, compiled = pair(Net(recompute=True), **options, strict=False)
    ours, theirs = steps(eager, X), steps(compiled, X)
    learned = 3 + len(list(eager.parameters()))
    assert_same(ours[:learned], theirs[:learned])
    assert torch_getfuse.report(compiled).unplanned == ()


@pytest.mark.slow
def test_three_steps_of_resnet18_equal_eager_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18(weights=None)
    x = torch.randn(2, 3, 64, 64)
    calibrate_batch_norm(model, x)
    eager, compiled = pair(model.train(), buffer="256KB")
    assert_same(steps(eager, x), steps(compiled, x))


def test_switching_modes_and_autocast_between_calls() -> None:
    torch.manual_seed(0)
    eager, compiled = pair(Net())
    for train, half in ((True, False), (False, False), (True, True), (False, True), (True, False)):
        results = []
        for model in (eager, compiled):
            model.train(train)
            model.zero_grad()
            torch.manual_seed(1)
            with torch.amp.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                y = model(X)
            y.float().sum().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([y, *grads, *model.buffers()])
        assert_same(*results)


def test_the_backward_has_a_section_of_its_own() -> None:
    eager, compiled = pair(Net(), backward=True)
    compiled(X).sum().backward()
    report = torch_getfuse.report(compiled)
    forward, backward = report.sections
    assert (forward.name, backward.name) == ("", "graph 0 backward")
    assert forward.plan.graph.fingerprint == torch_getfuse.plan(eager, (X,)).graph.fingerprint
    assert backward.unsupported["convolution_backward"] == 3
    backward.plan.verify()
    assert "graph 0 backward: DRAM access per sample" in one_line(report)
    # Weights of the forward are weights of the backward, not maps.
    assert any(op.weight_elements for op in backward.plan.graph.ops)
    assert any(op.module.startswith("body") for op in backward.plan.graph.ops)


def test_the_groups_of_the_plan_are_those_of_the_aten_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    original = training.split_graph_module

    def spy(gm: object, groups: object, names: list[str]) -> object:
        seen.append(names)
        return original(gm, groups, names)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "split_graph_module", spy)
    _, compiled = pair(Net(), backward=True)
    compiled(X)
    plan = torch_getfuse.report(compiled).sections[0].plan
    children = len(plan.groups), len(plan.unfusable)
    names = [f"fusion_group_{k}" for k in range(children[0])]
    assert seen[0] == names + [f"unfusable_{k}" for k in range(children[1])]


def test_a_backward_that_cannot_be_planned_runs_unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise IndexError("no backward today")

    monkeypatch.setattr(training, "capture_fx", fail)
    torch.manual_seed(0)
    eager, compiled = pair(Net(), backward=True, strict=False)
    with pytest.warns(UserWarning, match="backward: IndexError: no backward today"):
        got = steps(compiled, X)
    assert_same(steps(eager, X), got)
    text = one_line(torch_getfuse.report(compiled))
    assert "the graph backward runs unplanned: IndexError: no backward today" in text


class Branches(nn.Module):
    """Four readers of one map; the first branch ends in the group of the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 5, 7))
        self.last = nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.last(torch.cat([conv(y) for conv in self.convs], 1)).mean((2, 3))


@pytest.mark.parametrize("buffer", ["2KB", "4KB", "8KB", "16KB", "64KB"])
def test_the_sum_of_many_gradients_keeps_its_order(buffer: str) -> None:
    torch.manual_seed(0)
    eager, compiled = pair(Branches(), buffer=buffer)
    assert_same(steps(eager, X), steps(compiled, X))
    assert len(torch_getfuse.report(compiled).sections) == 1


def test_the_backward_of_a_batch_norm_in_eval_mode() -> None:
    """It saves empty tensors for its backward, which move nothing."""
    torch.manual_seed(0)
    eager, compiled = pair(Net().eval(), backward=True)
    assert_same(steps(eager, X), steps(compiled, X))
    _, backward = torch_getfuse.report(compiled).sections
    assert backward.plan.graph.ops
    assert all(0 not in t.shape for t in backward.plan.graph.tensors.values())


def test_inference_plans_no_backward() -> None:
    _, compiled = pair(Net().eval(), backward=True)
    with torch.no_grad():
        compiled(X)
    assert len(torch_getfuse.report(compiled).sections) == 1


def test_a_given_plan_is_for_the_forward_only() -> None:
    torch.manual_seed(0)
    model = Net()
    plan = torch_getfuse.plan(model, (X,), buffer="8KB", split_before=["body.2"])
    assert any(group.ops[0] == "body.2" for group in plan.groups)
    eager, compiled = pair(model, backward=True, plan=plan)
    assert_same(steps(eager, X), steps(compiled, X))
    sections = torch_getfuse.report(compiled).sections
    assert sections[0].plan.groups == plan.groups
    assert sections[1].name == "graph 0 backward"


def test_a_backward_has_the_buffer_of_a_given_plan() -> None:
    plan = torch_getfuse.plan(Net(), (X,), buffer="4KB", weight_bytes=1)
    options = {"plan": plan, "backward": True, "strict": True}
    compiled = torch.compile(Net(), backend="getfuse", options=options)
    compiled(X).square().mean().backward()
    forward, backward = (section.plan for section in torch_getfuse.report(compiled).sections)
    assert (forward.buffer_bytes, forward.weight_bytes) == (4096, 1)
    assert (backward.buffer_bytes, backward.weight_bytes) == (4096, 1)
