"""Files that are as they were or whole, wherever saving is interrupted: written beside, then moved into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".saving-"
"""How the names of folders begin that hold what is not yet in place; one that a killed process left can be deleted."""


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder`` (made if need be), for files that ``put`` moves; gone behind the block.

    Inside, because a folder may be a link or a file system of its own, and a move within one is a single step.

    Raises:
        OSError: of the kind that it was, and with what it says about ``folder``.
    """
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        yield temporary
    except OSError as error:
        words = f"{error.strerror or error}, while saving; no file there is half written"
        raise OSError(error.errno, words, str(folder)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def put(file: Path, target: Path) -> None:
    """Move a file that is whole to ``target``, whose mode it takes over.

    A link there is replaced, not followed: what it leads to, such as a blob of the Hub's cache, belongs to others.
    """
    if target.is_file() and not target.is_symlink():
        shutil.copymode(target, file)
    with file.open("r+b") as written:
        os.fsync(written.fileno())
    os.replace(file, target)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, in folders that are made if need be.

    Raises:
        OSError: as in ``beside``.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """``write_text`` of what is no text."""
    with beside(path.parent) as folder:
        file = folder / path.name
        file.write_bytes(content)
        put(file, path)
