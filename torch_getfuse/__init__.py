"""Layer fusion for accelerators with a small on-chip buffer, as a torch.compile backend.

Names are imported when first used, so that the command line's ``--help`` and code that only
reads plans do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_getfuse.api import explain, plan, report, run_counted, split
    from torch_getfuse.backend.rowwise.ledger import Ledger
    from torch_getfuse.errors import (
        CaptureError,
        GetfuseError,
        GraphError,
        Interrupted,
        OptionError,
        PlanError,
    )
    from torch_getfuse.partition.plan import PartitionPlan, load_plan
    from torch_getfuse.reporting.explanation import Explanation
    from torch_getfuse.reporting.report import Report
    from torch_getfuse.reporting.sweep_result import Sweep
    from torch_getfuse.sweeps import sweep

_HOMES = {
    "CaptureError": "errors",
    "Explanation": "reporting.explanation",
    "GetfuseError": "errors",
    "GraphError": "errors",
    "Interrupted": "errors",
    "Ledger": "backend.rowwise.ledger",
    "OptionError": "errors",
    "PartitionPlan": "partition.plan",
    "PlanError": "errors",
    "Report": "reporting.report",
    "Sweep": "reporting.sweep_result",
    "explain": "api",
    "load_plan": "partition.plan",
    "plan": "api",
    "report": "api",
    "run_counted": "api",
    "split": "api",
    "sweep": "sweeps",
}

__all__ = [
    "CaptureError",
    "Explanation",
    "GetfuseError",
    "GraphError",
    "Interrupted",
    "Ledger",
    "OptionError",
    "PartitionPlan",
    "PlanError",
    "Report",
    "Sweep",
    "explain",
    "load_plan",
    "plan",
    "report",
    "run_counted",
    "split",
    "sweep",
]


# The function ``explain`` shares its name with a folder. Loading this first, and taking it out of
# this namespace, leaves the name to the function for good.
import_module(f"{__name__}.explain")
del globals()["explain"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
