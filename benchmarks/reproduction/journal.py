"""Finished runs as JSON lines: one row per run, found again by its key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Journal:
    """Rows of a file; reading changes nothing, and every new row is written at once.

    A last line that a killed process left unfinished does not count: its run is not done, and
    the first row that is appended takes its place.

    Args:
        path: the file, made with the first row. One process at a time may append to it.

    Attributes:
        rows: by key; of several with one key the last.

    Raises:
        ValueError: for a whole line that is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        data = path.read_bytes() if path.exists() else b""
        self._whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a row of this benchmark ({error}); move the file"
                ) from error

    def append(self, row: Row) -> None:
        """Keep a row in memory and in the file."""
        self.rows[row["key"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row).encode() + b"\n"
        with self.path.open("ab") as file:
            os.truncate(self.path, self._whole)
            file.write(line)
        self._whole += len(line)
