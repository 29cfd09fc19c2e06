"""Image lists as OpenOOD publishes them: a text file with a path and a label per line."""

from __future__ import annotations

__all__ = ["ImageList", "read_list"]

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ood_core.data.decode import printable
from ood_core.data.sources import FileSource, PathLike
from ood_core.errors import DataError, MissingDataError


class ImageList(FileSource):
    """The images of a list, wherever these lie. The id is the path as written, the label -1 means none.

    Args:
        file: lines of path, space, label.
        root: what the places are relative to; by default the file's folder.
        places: where an image of the list may be: `{path}` is its path, `{rest}` the same without the first folder,
            `{name}` the file name and `{label}` the label's name. The first that holds the first image counts.
        label_names: what the labels 0, 1, ... are called; by default the labels are taken as written.

    Raises:
        MissingDataError: no such file, or images that are not there.
        DataError: a line of another form, or a label out of range.

    Example:
        >>> ImageList("test_ninco.txt", "data", places=["images_largescale/{path}"])  # doctest: +SKIP
    """

    def __init__(
        self,
        file: PathLike,
        root: PathLike | None = None,
        *,
        places: Sequence[str] = ("{path}",),
        label_names: Sequence[str] | None = None,
    ) -> None:
        file = Path(file)
        rows = [(path, _label(file, label, label_names)) for path, label in read_list(file)]
        base = file.parent if root is None else Path(root)
        place = _place(file, base, places, *rows[0])
        paths = [os.path.join(base, _fill(place, *row)) for row in rows]
        if absent := [path for path in paths if not os.path.exists(path)]:
            raise MissingDataError(
                f"{len(absent):,} of the {len(paths):,} images of {str(file)!r} are not there, first {absent[0]!r}."
            )
        super().__init__([printable(path) for path, _ in rows], paths, [label for _, label in rows])
        self.place = printable(str(file))


def read_list(file: Path) -> list[tuple[str, str]]:
    """Path and label of every line of an image list.

    Raises:
        MissingDataError: no such file.
        DataError: no line, or one of another form.
    """
    if not file.is_file():
        raise MissingDataError(f"There is no image list {str(file)!r}; check the path.")
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
    if not rows:
        raise DataError(f"Image list {str(file)!r} is empty.")
    if wrong := [row for row in rows if len(row) < 2]:
        raise DataError(f"{str(file)!r} has the line {wrong[0][0]!r}; write path, space, label.")
    return [(path, label) for path, label in rows]


def _label(file: Path, label: str, names: Sequence[str] | None) -> str | None:
    if label == "-1":
        return None
    if names is None:
        return label
    if not label.isdecimal() or int(label) >= len(names):
        raise DataError(f"{str(file)!r} has the label {label!r}; it must be -1 or one of 0 to {len(names) - 1}.")
    return names[int(label)]


def _fill(place: str, path: str, label: str | None) -> str:
    parts = PurePosixPath(path)
    return place.format(path=path, rest=str(PurePosixPath(*parts.parts[1:])), name=parts.name, label=label or "")


def _place(file: Path, base: Path, places: Sequence[str], path: str, label: str | None) -> str:
    for place in places:
        if (base / _fill(place, path, label)).exists():
            return place
    tried = ", ".join(str(base / _fill(place, path, label)) for place in places)
    raise MissingDataError(f"The first image of {str(file)!r} is at none of {tried}; put the images there.")
