"""Partition plan -> FX submodules, one per fusion group, computing what the graph did.

``grouping.py`` takes a plan and a capture: open it first. ``submodules.py`` splits,
``gradient_order.py`` keeps the order in which gradients are summed, ``overlapping_inputs.py``
checks inputs at a call.
"""
