"""The version of this package, as it was installed."""

from __future__ import annotations

import importlib.metadata

NOT_INSTALLED = "0+not.installed"
"""What stands for the version where the sources are imported without being installed."""

try:
    __version__ = importlib.metadata.version("torch-getfuse")
except importlib.metadata.PackageNotFoundError:
    __version__ = NOT_INSTALLED
