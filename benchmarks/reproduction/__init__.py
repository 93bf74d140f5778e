"""The parts of ``benchmarks/paper.py``, the evaluation of arXiv 2501.00636 made again."""
