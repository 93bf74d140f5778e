"""The counted executor: fusion groups row by row in line buffers, with a ledger of bytes.

``depth_first.py`` makes a plan a module: open it first. ``group.py`` runs one group in the schedule
of the cost model, in ``rings.py``, counted in the ``ledger.py``. Kernels compute rows from rows:
``kernel_registry.py`` finds them in ``kernels.py``, ``spatial_kernels.py``, ``resize_kernels.py``
and ``reduction_kernels.py``; ``sliding.py``, ``operand_views.py`` and ``calls.py`` are what they
share. ``trial.py`` compares a group with its FX nodes before it is used. Nothing of ``packed``.
"""
