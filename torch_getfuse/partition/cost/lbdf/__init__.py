"""LBDF: line-buffer depth-first fusion (arXiv 2501.00636, section III; docs/method.md, section 3).

``model.py`` prices a group: open it first. Below it, ``axis_maps.py`` (how far ahead a consumer
reads a stream, and what it releases), ``branch_lag.py`` (how far a schedule runs ahead of a
consumer) and ``branch_peak.py`` (the peak where many branches meet). ``row_schedule.py`` is the
schedule itself, row by row, for what executes it.
"""
