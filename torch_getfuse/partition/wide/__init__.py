"""Bounds and plans of graphs too wide for the dynamic program; only the planner imports it.

``group_cover.py`` is the search; start here. It prices blocks (``block_prices.py``) so that the
sum of prices is a lower bound; groups with negative reduced cost come from a list
(``legal_groups.py``) or from an automaton of all sets (``automaton.py``, ``relaxation.py``; that of
LBDF: ``block_order.py``, ``hold_levels.py``, ``group_automaton.py``; that of BRR:
``tile_blocks.py``, ``tile_rows.py``, ``tile_sets.py``, ``tile_guide.py``, ``tile_builder.py``,
``tile_outline.py``, ``tile_automaton.py``), as columns (``group_columns.py``) of linear programs.
``branching.py`` chooses among them, with ``plan_cuts.py``; ``near_sets.py`` lists all that a
cheaper plan may use, ``legal_pricing.py`` asks which of those that undercut prices fit, and
``cycles.py`` finds groups that would wait for each other.
"""
