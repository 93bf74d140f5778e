"""Results for people to read: reports, explanations and sweeps, in text and data formats.

``section.py`` computes the figures of one plan, ``steps.py`` those that only a cascade plan has,
``outlook.py`` what cascade would reach beside another; ``report.py`` turns them into a report:
start here. Its text is in ``section_tables.py`` and ``step_tables.py``, with groups that are alike
in one row (``folding.py``), ``kinds.py`` and ``module_tree.py``, its rows of operators in
``operators_table.py``; ``estimates.py`` has time and energy by the figures of an accelerator.
Its interactive page is made in ``html/``. ``blame.py`` and ``explanation.py`` are the result of
:func:`torch_getfuse.explain`, ``appraisal.py`` that of :func:`torch_getfuse.price`,
``sweep_result.py`` that of :func:`torch_getfuse.sweep`, with the smallest buffers of
``smallest.py`` and the knees of ``knee.py``; all print as ``printed.py`` says. ``export.py`` writes
tables in every format, those of plain text by ``layout.py``, and ``suffixes.py`` names the files
that results are saved in; ``pictures.py``, ``sweep_picture.py`` and ``search_picture.py`` draw
figures of ``figure.py``. ``notebook.py`` is HTML for Jupyter: ``notebook_style.py`` makes cards of
tables, ``plan_card.py`` one of a plan.
"""
