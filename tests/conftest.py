"""Settings of the whole test run."""

import os
import tempfile

# Two threads on two busy cores wait for each other at every operator, which made whole-network
# tests forty times slower. Read by torch when it is first imported, so set before any test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Plans that tests cache must neither come from nor go to the user's own folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="getfuse-test-cache-")
