"""Why a group does not fit: a predictor of validity, and explainers that blame edges of a group.

In pipeline order: ``features.py`` (a group as tensors), ``validity.py`` (the GNN),
``explainers.py`` (from a group to its solution edges: open it first), ``rg_explainer.py``,
``metrics.py``, ``trained_weights.py``. ``sampling.py`` and ``dataset.py`` are groups as training
meets them; ``training/`` makes the weights. ``geometric.py`` is PyTorch Geometric, an extra.
"""
