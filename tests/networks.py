"""The networks of the paper, with random weights and batch norm that has seen data."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import nn

from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.ir import OpGraph
from torch_getfuse.models import calibrate_batch_norm, import_torchvision

SIZES = {
    "vgg16": 224,
    "squeezenet1_0": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_small": 224,
    "mobilenet_v3_large": 224,
    "resnet18": 224,
    "resnet50": 224,
    "resnet101": 224,
    "resnet152": 224,
    "efficientnet_b0": 224,
    "efficientnet_b3": 300,
    "alexnet": 224,
    "deeplabv3_mobilenet_v3_large": 513,
}


@lru_cache(maxsize=2)
def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network in eval mode and an input; outputs that depend on it."""
    models = import_torchvision().models
    torch.manual_seed(0)
    if name.startswith("deeplab"):
        model = getattr(models.segmentation, name)(weights=None, weights_backbone=None)
    else:
        model = getattr(models, name)(weights=None)
    # Statistics need two samples where a batch norm follows a global pool.
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    model = model.eval()
    calibrate_batch_norm(model, x)
    return model, x[:1]


@cache
def operator_graph(name: str, size: int = 0) -> OpGraph:
    """The network's operator graph, once per test run; ``size`` for another image.

    On the meta device nothing is computed and no weight is stored, and one model and one set of
    shapes give one graph however it is captured (tests/backend/test_capture.py).
    """
    models = import_torchvision().models
    size = size or SIZES[name]
    with torch.device("meta"):
        if name.startswith("deeplab"):
            model = getattr(models.segmentation, name)(weights=None, weights_backbone=None)
        else:
            model = getattr(models, name)(weights=None)
        return capture_model(model.eval(), (torch.empty(1, 3, size, size),)).graph
