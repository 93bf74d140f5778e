"""Training by the clients people use: what they train is eager's, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_getfuse
from torch_getfuse.models import import_torchvision

pytestmark = pytest.mark.slow
import_torchvision()  # most of them import it, and it may be of another torch build

OPTIONS = {"buffer": "64KB", "inner": "eager", "strict": True, "cache": False}
State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Small, with batch statistics, a skip connection and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.conv(x) + x))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(16, 3, 16, 16, generator=generator),
        torch.randint(0, 4, (16,), generator=generator),
    )


def compiled(net: nn.Module) -> nn.Module:
    torch.compiler.reset()
    net.compile(backend="getfuse", options=OPTIONS)
    return net


def state(net: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def assert_trained_alike(train: Callable[[nn.Module], nn.Module], net: nn.Module) -> None:
    """Train a copy in eager and one compiled; all parameters and buffers are equal, and moved."""
    before = state(net)
    plain, fused = deepcopy(net), compiled(deepcopy(net))
    found: list[State] = []
    for model in (plain, fused):
        torch.manual_seed(7)
        found.append(state(train(model)))
    assert found[0].keys() == found[1].keys() == before.keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], before[name]) for name in before)
    assert torch_getfuse.report(fused).sections


def network() -> Net:
    torch.manual_seed(0)
    return Net().train()


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")

    def train(net: nn.Module) -> nn.Module:
        accelerator = accelerate.Accelerator(cpu=True)
        parts = net, torch.optim.AdamW(net.parameters()), DataLoader(data(), batch_size=8)
        net, optimizer, batches = accelerator.prepare(*parts)
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
        return accelerator.unwrap_model(net)

    assert_trained_alike(train, network())


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Wrapped(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train(net: nn.Module) -> nn.Module:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(Wrapped(net), DataLoader(data(), batch_size=8))
        return net

    assert_trained_alike(train, network())


def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4)
    samples = [{"pixel_values": x, "labels": int(y)} for x, y in data()]

    def train(net: nn.Module) -> nn.Module:
        how = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(net, how, train_dataset=samples).train()
        return net

    assert_trained_alike(train, ResNetForImageClassification(config))


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    torch.manual_seed(0)
    net = timm.create_model("mobilenetv3_small_050", num_classes=4, drop_rate=0.1)

    def train(net: nn.Module) -> nn.Module:
        optimizer = create_optimizer_v2(net, "adamw", lr=1e-3)
        average, loss = ModelEmaV3(net, decay=0.9), LabelSmoothingCrossEntropy()
        for x, y in DataLoader(data(), batch_size=8):
            optimizer.zero_grad()
            loss(net(F.interpolate(x, size=48)), y).backward()
            dispatch_clip_grad(net.parameters(), 1.0)
            optimizer.step()
            average.update(net)
        return average.module

    assert_trained_alike(train, net)


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["conv", "head.3"], r=2)

    def train(net: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for x, y in DataLoader(data(), batch_size=8):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        return net

    assert_trained_alike(train, peft.get_peft_model(network(), adapters))


# -- distributed data parallel, two processes ----------------------------------------------------


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # They meet in a file: no port that another program takes, no store that ends with one of them.
    store = f"file://{folder}/store"
    limit = timedelta(minutes=5)
    dist.init_process_group("gloo", store, limit, rank=rank, world_size=2)
    for name in ("eager", "getfuse"):
        torch.manual_seed(0)
        net: nn.Module = Net().train()
        if name == "getfuse":
            net = compiled(net)
        parallel = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.manual_seed(7 + rank)
        x, y = data().tensors
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(parallel(x[rank::2]), y[rank::2]).backward()
            optimizer.step()
        torch.save(state(net), f"{folder}/{name}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    mp.spawn(one_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = [torch.load(tmp_path / f"{name}{rank}.pt") for name in ("eager", "getfuse")]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        assert found[0].keys() == found[1].keys()
