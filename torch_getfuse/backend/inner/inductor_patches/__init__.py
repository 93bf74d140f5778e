"""Workarounds for faults of inductor, in force only while a group is compiled.

``mended.py`` compiles a group with them: open it first. ``scatters.py`` rewrites scatters to axes
of size one in its graphs. ``strides.py`` answers questions about symbolic strides; ``replaced.py``
puts these answers in the place of inductor's own functions, for the versions of torch that need
them, and takes them out again.
"""
