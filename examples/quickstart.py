"""MobileNetV2 through torch.compile with fusion groups for a 256 KB buffer.

    python examples/quickstart.py        (or: make demo)

The compiled model computes what eager does; the report says which operators run together, what
that saves of DRAM access, and how far it is from the optimum.
"""

import torch

import torch_getfuse
from torch_getfuse.models import calibrate_batch_norm, import_torchvision

torch.manual_seed(0)
model = import_torchvision().models.mobilenet_v2(weights=None).eval()
calibrate_batch_norm(model, torch.randn(8, 3, 224, 224))  # random weights alone give outputs near 0
x = torch.randn(1, 3, 224, 224)

compiled = torch.compile(model, backend="getfuse", options={"buffer": "256KB"})
with torch.no_grad():
    expected = model(x)
    y = compiled(x)

error = ((y - expected).abs().max() / expected.abs().max()).item()
print(f"max relative error against eager: {error:.2e}\n")
torch_getfuse.report(compiled).show()  # in colours on a terminal
if not error < 1e-4:
    raise SystemExit("the compiled model does not compute what eager does")
