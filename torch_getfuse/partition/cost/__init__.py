"""Cost models: buffer and DRAM bytes of a fusion group, under a fusion scheme.

``scheme.py`` is the interface (:class:`FusionScheme`) and the evaluator that remembers prices: open
it first. ``registry.py`` finds a scheme by name. ``lbdf/`` and ``brr/`` are the paper's two,
``cascade/`` adds tensors that stay on chip and weights that stream. In: an operator graph and a set
of operators. Out: named terms that sum to the buffer and to the traffic.
"""
