"""The parts of ``python -m benchmarks.border_ranking``.

``graphs`` names and captures the graphs, ``data`` has their optimal plans proved, ``model`` is what
learns the borders of these plans and ``train`` has it learn them, ``rankers`` turns a model into an
order of edges, ``compare`` runs the searches with each order, ``findings`` says what came out, and
``page`` writes docs/border-ranking.md.
"""
