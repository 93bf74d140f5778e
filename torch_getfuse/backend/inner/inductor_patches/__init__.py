"""Workarounds for faults of inductor, in force only while a group is compiled.

``scatters.py`` rewrites scatters to axes of size one in a group's graph. ``strides.py`` answers
questions about symbolic strides; ``replaced.py`` puts these answers in the place of inductor's own
functions, for the versions of torch that need them, and takes them out again.
"""
