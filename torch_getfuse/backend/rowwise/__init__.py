"""The counted executor: fusion groups row by row in line buffers, with a ledger of bytes.

``depth_first.py`` makes a plan a module: open it first. ``group.py`` is one group in the split
graph; ``turns.py`` has its schedule, that of the cost model, and ``execution.py`` carries it out in
``rings.py``, counted in the ``ledger.py``. ``onchip.py`` has what stays on chip from step to step
of a cascade plan, ``weights.py`` what a fetch of weights moves. Kernels compute rows from rows:
``kernel_registry.py`` finds them in ``kernels.py``, ``spatial_kernels.py``, ``resize_kernels.py``,
``joining_kernels.py``, ``copy_kernels.py`` and ``reduction_kernels.py``; ``sliding.py``,
``operand_views.py`` and ``calls.py`` are what they share. ``trial.py`` compares a group with its FX
nodes before it is used. Nothing of ``packed``.
"""
