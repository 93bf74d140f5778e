"""Training of the shipped weights from scratch: networks, samples of their groups, training.

``train.py`` is the command (``python -m torch_getfuse.explain.training.train``); start here.
``data.py`` builds the data set; ``synthetic.py`` adds random networks to the paper's.
"""
