"""Results for people to read: reports, explanations and sweeps, in text and data formats.

``section.py`` computes the figures of one plan, ``steps.py`` those that only a cascade plan has,
``outlook.py`` what cascade would reach beside another; ``report.py`` turns them into a report:
start here. Its text is in ``section_tables.py`` and ``step_tables.py``; ``estimates.py`` has time
and energy by the figures of an accelerator.
Its interactive page is made in ``html/``. ``blame.py`` and ``explanation.py`` are the result of
:func:`torch_getfuse.explain`, ``appraisal.py`` that of :func:`torch_getfuse.price`,
``sweep_result.py`` that of :func:`torch_getfuse.sweep`, with the smallest buffers of
``smallest.py``. ``export.py`` writes tables in every format, ``pictures.py`` draws,
and ``suffixes.py`` names the files that results are saved in.
"""
