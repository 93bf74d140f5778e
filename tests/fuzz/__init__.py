"""Random torch programs, each a pure function of its seed, held against eager.

``generate`` draws a program, ``check`` runs it every way that the package offers, ``shrink`` makes
a failing one short. ``python -m tests.fuzz --help`` runs many.
"""
