"""The operator graph, which everything above is about.

``op.py`` has tensors and operators; ``graph.py`` the graph of them (:class:`OpGraph`, verified on
construction, with a fingerprint); ``window.py`` says which positions of an input an output position
needs. In: what
capture found, or a plan file. Out: what cost models price and searches partition. No torch.
"""

from torch_getfuse.ir.graph import MOST_OPERATORS, OpGraph
from torch_getfuse.ir.op import Op, Read, Tensor
from torch_getfuse.ir.window import Pair, Window, WindowKind

__all__ = ["MOST_OPERATORS", "Op", "OpGraph", "Pair", "Read", "Tensor", "Window", "WindowKind"]
