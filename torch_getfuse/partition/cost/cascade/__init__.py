"""Cascade: tensors that stay on chip, weights that stream (docs/method.md, section 12).

``way.py`` has the records of a step.
"""
