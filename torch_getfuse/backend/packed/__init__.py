"""The fast executor: packed convolutions of oneDNN, some of them strip by strip.

``fast.py`` decides by the clock whether a graph is run so: open it first. ``steps.py`` makes a
graph steps, ``strips.py`` runs some strip by strip, ``tuning.py`` chooses which, ``program.py`` is
what runs, as the function that ``straight_line.py`` writes; where shapes are dynamic,
``any_size.py`` keeps one program per size. ``packed_conv.py`` and ``live_conv.py`` are two ways to
run a convolution; ``weight_store.py`` and ``snapshots.py`` prove at each call that packed weights
are current. Nothing of ``rowwise``.
"""
