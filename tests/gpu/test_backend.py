"""The backend on a CUDA device: the same plans as on the CPU, and eager's results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_getfuse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPTIONS = {"buffer": "16KB", "strict": True, "cache": False}


def network() -> nn.Module:
    """Convolutions, a skip connection and a classifier, with statistics that keep values apart."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
            self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.point = nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x + self.point(torch.relu(self.deep(x)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return Block().eval()


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, dtype=dtype, device="cuda")


@pytest.mark.fast_program
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", ["eager", "auto"])
def test_results_are_eagers(inner: str, dtype: torch.dtype) -> None:
    model, x = network().to("cuda", dtype), image(dtype)
    compiled = torch.compile(model, backend="getfuse", options={**OPTIONS, "inner": inner})
    with torch.no_grad():
        y = compiled(x)
        assert y.device.type == "cuda"
        assert torch.equal(y, model(x))


@pytest.mark.fast_program
def test_inner_auto_says_that_it_was_not_measured() -> None:
    model = network().cuda()
    compiled = torch.compile(model, backend="getfuse", options=OPTIONS)
    with torch.no_grad():
        compiled(image())
    (section,) = torch_getfuse.report(compiled).sections
    (note,) = (note for note in section.notes if note.startswith("inner auto"))
    assert "cuda" in note
    assert "inner='inductor'" in note


def test_the_plan_is_that_of_the_cpu() -> None:
    model, x = network(), image()
    on_gpu = torch_getfuse.plan(model.cuda(), (x,), buffer="16KB", cache=False)
    on_cpu = torch_getfuse.plan(model.cpu(), (x.cpu(),), buffer="16KB", cache=False)
    assert on_gpu.to_dict() == on_cpu.to_dict()


def test_training_gives_eagers_gradients() -> None:
    model, x = network().cuda(), image()
    compiled = torch.compile(model, backend="getfuse", options=OPTIONS)
    found = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(model.parameters()))
    for right, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, right)


def test_inductor_is_near_eager() -> None:
    pytest.importorskip("triton")
    model, x = network().cuda(), image()
    compiled = torch.compile(model, backend="getfuse", options={**OPTIONS, "inner": "inductor"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


def test_rows_run_on_the_cpu_only_and_say_so() -> None:
    options = {**OPTIONS, "inner": "depth_first"}
    compiled = torch.compile(network().cuda(), backend="getfuse", options=options)
    with pytest.raises(Exception, match="rows run on the CPU"), torch.no_grad():
        compiled(image())


def test_a_wrong_option_is_refused_as_on_the_cpu() -> None:
    compiled = torch.compile(network().cuda(), backend="getfuse", options={"bufer": "16KB"})
    with pytest.raises(Exception, match=r"OptionError.*bufer"), torch.no_grad():
        compiled(image())
