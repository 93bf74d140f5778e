"""``python -m torch_getfuse``: the command line."""

import sys

from torch_getfuse.cli import main

sys.exit(main())
