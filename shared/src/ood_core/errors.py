"""Errors a user can mend; each carries the exit status that the command line gives for it."""

from __future__ import annotations

__all__ = [
    "DataError",
    "ImageError",
    "MissingDataError",
    "NotFittedError",
    "OODError",
    "UsageError",
    "WriteError",
    "unknown_name",
]

import difflib
from collections.abc import Iterable


class OODError(Exception):
    """Base of this library's errors: a sentence with the offending value and the remedy."""

    exit_code = 1


class UsageError(OODError, ValueError):
    """A wrong argument, an unknown name, a combination that cannot work (exit status 2)."""

    exit_code = 2


class DataError(OODError, ValueError):
    """Data that is there but cannot be used (exit status 3)."""

    exit_code = 3


class MissingDataError(OODError, FileNotFoundError):
    """A file, folder or column that is not there (exit status 3)."""

    exit_code = 3

    def __str__(self) -> str:
        return Exception.__str__(self)


class WriteError(OODError, OSError):
    """A file that cannot be written: the disk is full, or it must not be (exit status 3)."""

    exit_code = 3

    def __str__(self) -> str:
        return Exception.__str__(self)


class ImageError(DataError):
    """One image that cannot be decoded; the message names the file and the reason."""


class NotFittedError(OODError, RuntimeError):
    """A detector used before `fit` or `calibrate` (exit status 4)."""

    exit_code = 4


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for an unknown name, with the nearest known ones.

    Example:
        >>> str(unknown_name("detector", "mmc", ["mcm", "knn"]))
        "Unknown detector 'mmc'. Did you mean 'mcm'? Known: knn, mcm."
    """
    known = sorted(known)
    lower = {one.lower(): one for one in known}
    near = [lower[one] for one in difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UsageError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")
