"""Results for people to read: reports, explanations and sweeps, in text and data formats.

``section.py`` computes the figures of one plan; ``report.py`` turns them into a report; start here.
``blame.py`` and ``explanation.py`` are the result of :func:`torch_getfuse.explain`,
``sweep_result.py`` that of :func:`torch_getfuse.sweep`. ``export.py`` writes tables in every
format, ``pictures.py`` draws.
"""
