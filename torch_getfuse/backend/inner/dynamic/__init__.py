"""Dynamic shapes of fusion groups: ``symbols.py`` gives a group the sizes that it needs,
``own_sizes.py`` compiles it for sizes of its own.
"""
