"""Atomic writes: a file, or several that belong together, are there whole, or as they were before."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ood_core.errors import DataError, OODError, WriteError

SCHEMA = 1
"""Version of the files written here."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there.

    Raises:
        WriteError: the disk is full, or the folder may not be written to.
    """
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, files: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write several files of a folder: all of them, or none.

    Args:
        folder: made if it is not there.
        files: how to fill a file, by its name; the last one vouches for the others.

    Raises:
        WriteError: the disk is full, or the folder may not be written to.
    """
    temporaries = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, write in zip(temporaries, files.values(), strict=True):
            temporary = temporaries[path]
            write(temporary)
            temporary.chmod(_default_mode())  # some writers make private files
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except Exception as error:
        raise _sentence(path, error) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _sentence(path: Path, error: Exception) -> Exception:
    """What a person can mend of it; other errors stay what they are. Safetensors has an error of its own."""
    if isinstance(error, OODError):
        return error
    text = str(error)
    if "os error 28" in text or "StorageFull" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return WriteError(f"{str(path)!r} cannot be written: the disk is full. Make room, or write to another disk.")
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        reason = getattr(error, "strerror", None) or text.rstrip(".")
        return WriteError(f"{str(path)!r} cannot be written: {reason}. Make it writable, or write elsewhere.")
    return error


def _default_mode() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return 0o666 & ~umask


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable and with every digit."""
    write_atomically(path, json_writer(value))


def json_writer(value: Any) -> Callable[[Path], Any]:
    """How to fill a file with JSON, readable and with every digit."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def check_schema(content: Mapping[str, Any], path: Path, package: str) -> None:
    """Refuse what a later version wrote: it may mean something else.

    Args:
        content: with a version under "schema"; the first version did not write any everywhere.
        path: of the file.
        package: that reads it.

    Raises:
        DataError: another version than this one's.
    """
    if (found := content.get("schema", SCHEMA)) != SCHEMA:
        raise DataError(
            f"{str(path)!r} has schema {found!r}, and this version of {package} reads schema {SCHEMA}: update it "
            f"(pip install -U {package})."
        )
