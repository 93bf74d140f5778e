"""The exact searches: dynamic programming over the down-sets of the graph.

In: a :class:`~torch_getfuse.partition.problem.FusionProblem`. Out: the optimum, or a lower bound
and the best plan known where the graph is too wide. ``down_sets.py``, to be opened first, goes
from the start; ``backward.py`` from the end, for groups that read weights again, over the arrays of
``down_set_table.py``; ``windows.py`` makes a plan better a part at a time; ``chains.py`` is what
all have in common. The proofs are in docs/exact-search.md.
"""
