"""``python -m torch_getfuse``: the command line."""

import sys

from torch_getfuse.cli.main import main

sys.exit(main())
