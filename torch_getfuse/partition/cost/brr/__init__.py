"""BRR, after Optimus: rows of convolutions full and partial in turn, weights once per tile.

``model.py`` is the scheme, ``rows.py`` how many rows a tile needs and ``starts.py`` which of its
convolutions are full.
"""
