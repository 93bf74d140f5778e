"""Layer fusion for accelerators with a small on-chip buffer, as a torch.compile backend.

Names are imported when first used, so that the command line's ``--help`` and code that only
reads plans do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_getfuse.accelerator import Accelerator
    from torch_getfuse.api import explain, plan, price, report, run_counted, split
    from torch_getfuse.backend.rowwise.ledger import Ledger
    from torch_getfuse.backend.rules.custom import register_rule
    from torch_getfuse.errors import (
        CaptureError,
        GetfuseError,
        GraphError,
        Interrupted,
        OptionError,
        PlanError,
        PluginError,
    )
    from torch_getfuse.ir import Op, OpGraph, Read, Tensor, Window, WindowKind
    from torch_getfuse.options import Options
    from torch_getfuse.partition.cost.scheme import CostTerm, Dram, FusionScheme, boundary
    from torch_getfuse.partition.node_set import bits
    from torch_getfuse.partition.plan import PartitionPlan, load_plan
    from torch_getfuse.partition.problem import FusionProblem, Repair, Search, SearchResult
    from torch_getfuse.partition.search.recursive_split import EdgeRanker
    from torch_getfuse.partition.search.run import Run
    from torch_getfuse.reporting.appraisal import Appraisal
    from torch_getfuse.reporting.explanation import Explanation
    from torch_getfuse.reporting.report import Report
    from torch_getfuse.reporting.sweep_result import Sweep
    from torch_getfuse.sweeps import sweep
    from torch_getfuse.version import __version__

_HOMES = {
    "Accelerator": "accelerator",
    "Appraisal": "reporting.appraisal",
    "CaptureError": "errors",
    "CostTerm": "partition.cost.scheme",
    "Dram": "partition.cost.scheme",
    "EdgeRanker": "partition.search.recursive_split",
    "Explanation": "reporting.explanation",
    "FusionProblem": "partition.problem",
    "FusionScheme": "partition.cost.scheme",
    "GetfuseError": "errors",
    "GraphError": "errors",
    "Interrupted": "errors",
    "Ledger": "backend.rowwise.ledger",
    "Op": "ir",
    "OpGraph": "ir",
    "OptionError": "errors",
    "Options": "options",
    "PartitionPlan": "partition.plan",
    "PlanError": "errors",
    "PluginError": "errors",
    "Read": "ir",
    "Repair": "partition.problem",
    "Report": "reporting.report",
    "Run": "partition.search.run",
    "Search": "partition.problem",
    "SearchResult": "partition.problem",
    "Sweep": "reporting.sweep_result",
    "Tensor": "ir",
    "Window": "ir",
    "WindowKind": "ir",
    "__version__": "version",
    "bits": "partition.node_set",
    "boundary": "partition.cost.scheme",
    "explain": "api",
    "load_plan": "partition.plan",
    "plan": "api",
    "price": "api",
    "register_rule": "backend.rules.custom",
    "report": "api",
    "run_counted": "api",
    "split": "api",
    "sweep": "sweeps",
}

__all__ = [
    "Accelerator",
    "Appraisal",
    "CaptureError",
    "CostTerm",
    "Dram",
    "EdgeRanker",
    "Explanation",
    "FusionProblem",
    "FusionScheme",
    "GetfuseError",
    "GraphError",
    "Interrupted",
    "Ledger",
    "Op",
    "OpGraph",
    "OptionError",
    "Options",
    "PartitionPlan",
    "PlanError",
    "PluginError",
    "Read",
    "Repair",
    "Report",
    "Run",
    "Search",
    "SearchResult",
    "Sweep",
    "Tensor",
    "Window",
    "WindowKind",
    "__version__",
    "bits",
    "boundary",
    "explain",
    "load_plan",
    "plan",
    "price",
    "register_rule",
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
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
