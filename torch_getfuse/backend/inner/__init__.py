"""How fusion groups run: each compiled by an inner backend, or left to eager.

``compile_groups.py`` compiles them: open it first. ``layouts.py`` keeps the strides that the trace
promises; ``dynamic/`` handles symbolic sizes; ``inductor_patches/`` mends inductor while it
compiles.
"""
