"""The parts of ``python -m benchmarks.border_ranking``.

``graphs`` names and captures the graphs, ``data`` has their optimal plans proved, ``model`` learns
the borders of these plans, ``rankers`` turns a model into an order of edges, ``compare`` runs the
searches with each order, and ``page`` writes docs/border-ranking.md.
"""
