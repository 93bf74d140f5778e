"""Files that are written whole or not at all.

A plan, a report or a cache entry that is replaced stays readable throughout: the new file is
written beside the old one and then takes its place. A run that is killed leaves the old file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

PART_PREFIX = ".new-"
"""Start of the name of a file that is being written; one that stays behind is from a killed run."""


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Replace the file at ``path`` by what ``write`` writes to the path that it is given.

    The file keeps its permissions; of a symbolic link the target is replaced; what is no regular
    file (``/dev/stdout``, a pipe) is written to directly.

    Args:
        path: of the file; its folder must exist.
        write: gets a path in the same folder, with the same suffix.

    Raises:
        OSError: where the file cannot be written; it names ``path``, and what was there stays.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            write(Path(path))
            return
        part = target.with_name(f"{PART_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
        # 0o666 less the process's umask, as for any new file.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            if target.exists():
                part.chmod(target.stat().st_mode & 0o7777)
            write(part)
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def replace_text(path: str | Path, text: str) -> None:
    """:func:`replace_file` with a text in UTF-8."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
