"""The exact search: dynamic programming over the down-sets of the graph (``down_sets.py``).

In: a :class:`~torch_getfuse.partition.problem.FusionProblem`. Out: the optimum, or a lower bound
and the best plan known where the graph is too wide. The proofs are in docs/exact-search.md.
"""
