"""What a user with little patience is told: mistakes, empty reports, modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torch_getfuse
from torch_getfuse import CaptureError, GetfuseError, OptionError, PlanError

X = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Convolution, batch norm, dropout, head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.drop(self.bn(self.layer1(x)).relu()).mean((2, 3)))
        return out


@pytest.fixture
def net() -> nn.Module:
    torch._dynamo.reset()
    return Net().eval()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="getfuse", options={"inner": "eager", **options})


# -- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "told"),
    [
        (X, {}, "args must be a tuple of example inputs, like (x,), not Tensor"),
        ([X], {}, "like (x,), not list"),
        ({"x": X}, {}, "not dict; inputs go by position, in the order of forward()"),
        ((), {}, "example inputs are missing: plan(model, (x,))"),
        ((1, 3, 8, 8), {}, "like (torch.zeros(1, 3, 8, 8),)"),
        ((X.numpy(),), {}, "input 0 is a numpy ndarray: give torch.from_numpy(x)"),
        ((X,), {"bufer": 1}, "unknown option 'bufer'; did you mean 'buffer'?"),
        ((X,), {"x": X}, "x= is an input of Net, not an option"),
        ((X,), {"accelerator": "tpu"}, "did you mean 'tpu-v1'?"),
        ((X,), {"buffer": "12XB"}, "buffer='12XB' is no size in bytes, KB, MB or GB"),
        ((X,), {"buffer": "1.1KB"}, "1126.4 bytes are no whole number; type 1127"),
    ],
)
def test_mistakes_are_told_in_one_line(
    net: nn.Module, args: Any, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(OptionError) as caught:
        torch_getfuse.plan(net, args, **options)
    text = str(caught.value)
    assert told in text
    assert len(text) < 160
    assert "\n" not in text


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("torchvision:resnet18", "load_model('torchvision:resnet18')"),
        (Net, "Net is a class: give an instance, like Net(...)"),
        (3, "got int"),
    ],
)
def test_what_is_no_model(model: Any, told: str) -> None:
    for call in (
        lambda: torch_getfuse.plan(model, (X,)),
        lambda: torch_getfuse.report(model, X),
        lambda: torch_getfuse.report(model),
        lambda: torch_getfuse.split(model, (X,), None),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionError) as caught:
            call()
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(1, 4, 8, 8), "Net does not run on 1x4x8x8 float32: Given groups=1"),
        (torch.zeros(3, 8, 8), "Net does not run on 3x8x8 float32: ValueError('expected 4D input"),
        (X.half(), "Net does not run on 1x3x8x8 float16: "),
    ],
)
def test_inputs_that_the_model_refuses(net: nn.Module, x: torch.Tensor, told: str) -> None:
    plan = torch_getfuse.plan(net, (X,))
    for call in (
        lambda: torch_getfuse.plan(net, (x,)),
        lambda: torch_getfuse.report(net.train(), x),
        lambda: torch_getfuse.run_counted(net, (x,), plan),
        lambda: torch_getfuse.explain(net, (x,)),
    ):
        with pytest.raises(CaptureError) as caught:
            call()
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None  # the model's own traceback is still there
    with pytest.raises(CaptureError) as caught:
        torch_getfuse.split(net, (x,), plan)
    assert "Net does not run on " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_mode_is_refused_with_the_mode(net: nn.Module) -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() if torch.is_grad_enabled() else x.relu().tanh()

    plan = torch_getfuse.plan(Looks(), (X,))
    with torch.no_grad():
        compiled(Looks(), plan=plan)(X)
    with pytest.raises(Exception, match=r"plan\(\) traces under torch.no_grad\(\)") as caught:
        compiled(Looks(), plan=plan)(X)
    assert isinstance(caught.value.inner_exception, PlanError)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["256K", "256KiB", "256 kb", "0.25MB", "262144", "256k", "0.25 m"])
def test_spellings_of_a_buffer(text: str) -> None:
    assert torch_getfuse.plan(nn.ReLU(), (X,), buffer=text).buffer_bytes == 1 << 18


def test_explain_names_what_there_is(net: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"'9' is neither an operator .*; there are layer1, .*fc"):
        torch_getfuse.explain(net, (X,), operators=["9"])
    with pytest.raises(OptionError, match=r"raise buffer= \(fc fits from 65 B up\)"):
        torch_getfuse.explain(net, (X,), buffer=8)


# -- reports of what was compiled ---------------------------------------------------------


def test_why_a_report_is_empty(net: nn.Module) -> None:
    told = str(torch_getfuse.report(net))
    assert "this was not compiled by torch.compile(model, backend=" in told
    told = str(torch_getfuse.report(compiled(net)))
    assert "call the compiled model once with an input" in told
    told = str(torch_getfuse.report(torch.compile(net, backend="eager")))
    assert "compiled with backend='eager'" in told
    net.compile(backend="eager")
    assert "compiled with backend='eager'" in str(torch_getfuse.report(net))
    for empty in (told, str(torch_getfuse.report(compiled(nn.Sequential())))):
        assert "report(model, x) plans without running" in empty


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_that_dynamo_keeps_to_itself(kind: type[nn.RNNBase]) -> None:
    torch._dynamo.reset()
    model, x = kind(4, 4).eval(), torch.zeros(5, 1, 4)
    run = compiled(model)
    with torch.no_grad():
        run(x)
    report = torch_getfuse.report(run)
    assert f"the model ({kind.__name__}) is left to eager by torch.compile" in str(report)
    assert report.to_dict()["unplanned"] == list(report.unplanned)
    assert len(torch_getfuse.report(model, x).sections) == 1


def test_a_recurrent_part_of_a_model_is_named() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = nn.Conv1d(4, 4, 3, padding=1), nn.LSTM(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.rnn(self.conv(x))[0]
            return out

    torch._dynamo.reset()
    run = compiled(Both().eval())
    with torch.no_grad():
        run(torch.zeros(5, 4, 4))
    assert "rnn (LSTM) is left to eager by torch.compile" in str(torch_getfuse.report(run))
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        run = compiled(Both().eval())
        run(torch.zeros(5, 4, 4))
    assert "left to eager" not in str(torch_getfuse.report(run))


def test_torchs_own_transformer_has_a_report() -> None:
    torch._dynamo.reset()
    run = compiled(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
    with torch.no_grad():
        run(torch.zeros(1, 5, 8))
    assert len(torch_getfuse.report(run).sections) == 1


# -- modes --------------------------------------------------------------------------------


def test_training_mode_is_told(net: nn.Module) -> None:
    assert not torch_getfuse.report(net, X).sections[0].notes
    (note,) = torch_getfuse.report(net.train(), X).sections[0].notes
    assert note == (
        "the model is in training mode: 1 batch norm of the batch's statistics, not folded into "
        "the convolutions and 1 random dropout; call model.eval() first for the plan of inference"
    )
    program = torch.export.export(net, (X,))
    assert torch_getfuse.report(program).sections[0].notes == (note,)
    with torch.no_grad():
        run = compiled(net)
        run(X.repeat(2, 1, 1, 1))
    assert note in torch_getfuse.report(run).sections[0].notes
    # In training mode by name only: the plan is the same, so there is nothing to tell.
    assert not torch_getfuse.report(nn.Sequential(nn.Conv2d(3, 4, 1)), X).sections[0].notes


def test_a_graph_traced_with_gradients_is_told(net: nn.Module) -> None:
    run = compiled(net)
    run(X)
    report = torch_getfuse.report(run)
    assert "traced with gradients enabled (report(model, x) traces without)" in " ".join(
        str(report).split()
    )
    assert report.to_dict()["sections"][0]["assumptions"]["gradients"] is True
    torch._dynamo.reset()
    run = compiled(net)
    with torch.no_grad():
        run(X)
    assert "gradients" not in str(torch_getfuse.report(run))


def test_errors_are_of_one_family() -> None:
    assert issubclass(CaptureError, GetfuseError)
