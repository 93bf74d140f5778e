"""Files that are written whole or not at all.

A plan, a report or a cache entry that is replaced stays readable throughout: the new file is
written beside the old one and then takes its place. A run that is killed leaves the old file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from torch_getfuse.errors import FileError

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
        FileError: where the file cannot be written; it names ``path``, and what was there stays.
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
        raise not_written(path, error) from error


def not_written(path: str | Path, error: OSError) -> FileError:
    """The error for a file that cannot be written, with the way out."""
    folder = Path(path).parent
    reason = error.strerror or str(error)
    if not folder.exists():
        reason = f"there is no folder {str(folder)!r}; make it, or give another path"
    elif Path(path).is_dir():
        reason = "it is a folder; give the path of a file in it"
    else:
        reason += "; give another path"
    found = FileError(f"cannot write {str(path)!r}: {reason}")
    found.errno, found.strerror, found.filename = error.errno, error.strerror, str(path)
    return found


def replace_text(path: str | Path, text: str) -> None:
    """:func:`replace_file` with a text in UTF-8."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
