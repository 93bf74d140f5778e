"""FX graph -> operator graph, however the graph was traced.

``capture.py`` is the way through: open it first. A model of eager-mode quantisation is replaced by
its reference (``eager_quantised.py``). Before it, the FX graph is brought to one form:
``exported_regions.py`` (regions of exported programs, inlined), ``decompose.py`` (calls without a
rule), ``view_changes.py`` (shape changes in place, as views), ``idle_casts.py`` (casts that do
nothing). Then ``graph_inputs.py`` (maps, weights, the batch), ``graph_builder.py`` with
``graph_values.py`` (operators and their reads), ``calls.py`` (what a call is called with),
``memory.py`` (what values show after writes) and ``bases.py`` (where the batch of a tensor is),
``streams.py`` (where its rows are, and the windows that follow from it), ``op_order.py`` (order
that no tensor gives), ``chosen_scales.py`` and ``quantisation.py`` (quantize and dequantize
folded), ``operators.py`` (batch norms folded, names), ``mode_notes.py`` (notes on the traced mode).
``renaming.py`` gives one capture the names of another.
"""
