"""Groups of other tools as lists of operators of a graph, for :func:`torch_getfuse.price`.

In: what a tool prints or saves, and the operator graph (``torch_getfuse.plan(...).graph``). Out:
lists of operator names. ``names.py`` matches many foreign names to one operator: open it first.
``vela.py`` reads the schedules of Arm's Vela, ``onnx_nodes.py`` lists of ONNX nodes.
"""
