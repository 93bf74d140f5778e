"""What people read: reports, explanations, sweeps, and their forms.

``section.py`` has the figures of one plan before they are text; ``report.py`` makes them a report:
open it first. ``blame.py`` and ``explanation.py`` are the answer of :func:`torch_getfuse.explain`,
``sweep_result.py`` that of :func:`torch_getfuse.sweep`. ``export.py`` writes tables in every
format, ``pictures.py`` draws.
"""
