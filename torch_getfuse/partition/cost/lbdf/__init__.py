"""LBDF: line-buffer depth-first fusion (arXiv 2501.00636, section III; docs/method.md, section 3).

``model.py`` computes the cost of a group; start here. It uses ``axis_maps.py`` (how far ahead a
consumer reads a stream, and what it releases), ``branch_lag.py`` (how far the schedule runs ahead
of a consumer) and ``branch_peak.py`` (the peak where many branches meet). ``row_schedule.py`` is
the schedule itself, row by row, for the executors.
"""
