"""Why a group does not fit: a validity predictor, and explainers that score edges of a group.

In pipeline order: ``features.py`` (a group as tensors), ``validity.py`` (the GNN),
``explainers.py`` (from a group to its solution edges; start here), ``rg_explainer.py``,
``metrics.py``, ``trained_weights.py``. ``sampling.py`` and ``dataset.py`` draw and pack the groups
for training; ``training/`` produces the weights. ``geometric.py`` is PyTorch Geometric, an extra.
"""
