"""From an exported program to a plan file, and back: what a build server and a colleague need.

    python examples/export_plan.py [FOLDER]

A program of ``torch.export`` brings its own shapes, so it is planned without inputs. The plan file
carries the operator graph: whoever has it can check every figure without the model, and compile
with it where the model is. The report is written as a page, a table of groups and one of operators.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import torch_getfuse

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="plan-"))
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
    *(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
).eval()
x = torch.randn(1, 3, 32, 32)

# On the build server: export, plan, write.
program = torch.export.export(model, (x,))
torch.export.save(program, folder / "model.pt2")
made = torch_getfuse.plan(program, buffer="24KB", cache=False)
made.save(folder / "plan.json")
report = torch_getfuse.report(made)
report.save(folder / "report.html")
report.save(folder / "groups.csv")
report.save(folder / "operators.csv", by="operator")

# At a colleague's: read, check without the model, prove the bound again.
read = torch_getfuse.load_plan(folder / "plan.json")
print(f"{read!r}, {read.standing}")
proved = read.verify(prove=True)
print(f"{proved!r}, {proved.standing}")
assert proved == made

# Where the model is: compile with that plan. One of another graph would be refused.
compiled = torch.compile(model, backend="getfuse", options={"plan": str(folder / "plan.json")})
with torch.no_grad():
    error = float((compiled(x) - model(x)).abs().max())
print(f"compiled with the plan of the file; off eager by {error:.1e} at most")
assert error < 1e-5

for file in sorted(folder.iterdir()):
    print(f"{file.name:14} {file.stat().st_size:>8,} bytes")
