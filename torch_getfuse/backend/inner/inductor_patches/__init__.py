"""Workarounds for faults of inductor, in force only while a group is compiled.

``scatters.py`` rewrites scatters to axes of size one; ``strides.py`` answers questions about
symbolic strides.
"""
