"""FX graph -> operator graph, however the graph was traced.

``capture.py`` is the way through: open it first. Before it: ``exported_regions.py`` (regions of
exported programs, inlined), ``decompose.py`` (calls without a rule), ``view_changes.py`` (shape
changes in place, as views). Then ``graph_inputs.py`` (maps, weights, the batch),
``graph_builder.py`` with ``graph_values.py`` (operators and their reads), ``op_order.py`` (order
that no tensor gives), ``mode_notes.py`` (notes on the traced mode).
"""
