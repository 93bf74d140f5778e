"""Files of JSON lines that a stopped run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file in order; none where there is no file, and no line that was cut off."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
