"""Operator rules: how each operator reads its operands, in one record per operator.

``rule.py`` has the records: open it first. ``pointwise.py``, ``spatial.py``, ``whole_axis.py``,
``rearranged.py``, ``indexing.py``, ``recurrent.py`` and ``alias.py`` have the rules, by how
operators read; ``view_windows.py`` the windows of reads through views; ``macs.py`` counts
multiply-accumulates; ``registry.py`` collects all rules and answers capture; ``custom.py`` adds
those of operators that are not torch's own. ``quantisation.py`` knows the calls that only change
how a tensor is stored, which are no operators.
"""
