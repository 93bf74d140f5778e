"""From an operator graph to a partition plan: what groups cost, and which are chosen. No torch.

In pipeline order: ``node_set.py`` (sets of operators as bit masks, connectivity, convexity),
``selection.py`` and ``pins.py`` (names that people type, and what a plan must keep to), ``cost/``
(what a group costs), ``problem.py`` (what a search is given: open this first), ``merging.py`` (a
first plan), ``search/`` (plans by cuts, edits and repair), ``exact/`` (the optimum over down-sets),
``wide/`` (bounds and plans of graphs that are too wide for it), ``steps/`` (cascade: the optimum
over sequences of steps), ``group_ends.py`` (why each group ends where it does),
``fusion_group.py``, ``group_check.py`` and ``plan.py`` (the plan, its file, ``verify``).
``work.py`` counts steps for time limits.
"""
