"""The largest sizes that are taken, by options and by files alike.

A file may come from anyone, so no size in it may make a check run for ever. Options refuse at once
what no file may hold: what can be planned can be saved and read again.
"""

from __future__ import annotations

MOST = 2**60
"""Largest count of bytes, elements or plans."""
MOST_POSITIONS = 2**31
"""Largest size of an axis, channels among them, and of a kernel, stride, dilation or padding."""
MOST_WIDTH = 2**10
"""Bytes of the widest element."""
