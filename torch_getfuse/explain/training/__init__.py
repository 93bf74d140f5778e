"""From nothing to the shipped weights: networks, samples of their groups, training.

``train.py`` is the command (``python -m torch_getfuse.explain.training.train``): open it first;
``data.py`` makes the data set; ``synthetic.py`` has random networks beside the paper's.
"""
