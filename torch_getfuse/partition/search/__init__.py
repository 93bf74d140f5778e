"""Searches over legal plans, and the recursive split that repairs invalid groups.

``edge_cuts.py`` (from an edge to the cuts that separate its ends), ``recursive_split.py``
(Algorithm 1 of arXiv 2501.00636; start here), ``merge_resplit.py`` (its last pass),
``random_split.py`` (repair without an explanation), ``moves.py`` (edits of plans), ``run.py``
(budget and best plan), then the searches: ``random.py``, ``local.py``, ``nsga2.py``. In: a
:class:`~torch_getfuse.partition.problem.FusionProblem`. Out: a search result.
"""
