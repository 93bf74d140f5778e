"""PyTorch Geometric is an extra: what needs it says so, and the rest does not load it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch_geometric":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch, torch_getfuse
from torch import nn
from torch_getfuse.cli.main import main

model = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3))).eval()
x, options = torch.rand(1, 16, 32, 32), {"buffer": "24KB", "cache": False}
assert torch_getfuse.plan(model, (x,), **options).proof == "optimal"
assert torch_getfuse.report(model, x, **options).sections
with torch.no_grad():
    compiled = torch.compile(model, backend="getfuse", options={**options, "inner": "eager"})
    assert torch.equal(compiled(x), model(x))
assert "all" in str(torch_getfuse.explain(model, (x,), explainers=["all"], **options))
for call in (
    lambda: torch_getfuse.explain(model, (x,), **options),
    lambda: torch_getfuse.plan(model, (x,), explainer="saliency", method="direct", **options),
):
    try:
        call()
    except torch_getfuse.OptionError as error:
        assert "pip install 'torch-getfuse[explain]'" in str(error), error
    else:
        raise AssertionError("nothing said that torch-geometric is missing")
assert main(["train", "--scheme", "lbdf"]) == 2
"""


def test_only_the_gnn_needs_torch_geometric() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "torch-getfuse[explain]" in done.stderr
    assert "Traceback" not in done.stderr
