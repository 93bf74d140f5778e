"""Settings of the whole test run."""

import os

# Two threads on two busy cores wait for each other at every operator, which made whole-network
# tests forty times slower. Read by torch when it is first imported, so set before any test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
