"""What is used of PyTorch Geometric, an extra: only the GNN and its explainers need it."""

from __future__ import annotations

from torch_getfuse.errors import OptionError

try:
    from torch_geometric.explain import (
        Explainer,
        ExplainerAlgorithm,
        Explanation,
        GNNExplainer,
        PGExplainer,
    )
    from torch_geometric.explain.config import (
        ExplanationType,
        ModelConfig,
        ModelMode,
        ModelTaskLevel,
    )
    from torch_geometric.nn import GraphConv, global_add_pool
    from torch_geometric.utils import get_embeddings
except ModuleNotFoundError as error:
    raise OptionError(
        f"the validity predictor and its explainers need torch-geometric ({error}): "
        "pip install 'torch-getfuse[explain]'; the explainers 'all' and 'random' need neither"
    ) from error

__all__ = [
    "Explainer",
    "ExplainerAlgorithm",
    "Explanation",
    "ExplanationType",
    "GNNExplainer",
    "GraphConv",
    "ModelConfig",
    "ModelMode",
    "ModelTaskLevel",
    "PGExplainer",
    "get_embeddings",
    "global_add_pool",
]
