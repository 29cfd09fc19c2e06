"""What was looked for on a disk and what was found; and the layout that is made of it."""

from __future__ import annotations

__all__ = ["Layout", "Survey", "data_root", "relabelled"]

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ood_core.data.sources import ImageSource, PathLike
from ood_core.errors import DataError, MissingDataError
from ood_core.protocols import FoundSet, describe

from ood_hvl.layouts.tasks import Task


@dataclass(frozen=True)
class Layout:
    """Images on this disk and the tasks they make.

    Attributes:
        name: of the benchmark.
        source: every image that a task uses; extract its embeddings once for all tasks.
        tasks: rows of `source`.
        found: files and folders with what was expected.
        notes: what differs from the paper's benchmark; every task has them, too.
    """

    name: str
    source: ImageSource
    tasks: list[Task]
    found: list[FoundSet]
    notes: list[str]

    def describe(self) -> str:
        """What was found where, and the tasks with their numbers of images, for people."""
        head = f"{self.name}: {len(self.source):,} images, {len(self.tasks)} tasks"
        notes = dict.fromkeys([*self.notes, *(note for task in self.tasks for note in task.notes)])
        tasks = [f"{task.name}: {_counts(task)}" for task in self.tasks]
        found = [describe(self.found)] if self.found else []
        return "\n".join([head, *found, *tasks, *(f"Note: {note}" for note in notes)])


def _counts(task: Task) -> str:
    parts = ", ".join(f"{part} {len(rows):,}" for part, rows in task.rows.items())
    return f"{len(task.class_names)} classes, {parts}"


@dataclass
class Survey:
    """Looks for one thing after another, and keeps what cannot be used as a line instead of raising it."""

    found: list[FoundSet] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def look(self, name: str, path: Path, expected: int | None, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of the path, with its length as the count; None where it cannot."""
        try:
            value = read(path)
        except (MissingDataError, DataError) as error:
            there = path if path.exists() else None
            self.found.append(FoundSet(name, there, 0, expected, type(error)(f"{name}: {error}")))
            return None
        source = value if isinstance(value, ImageSource) else None
        self.found.append(FoundSet(name, path, len(value), expected, None, source))
        self.values[name] = value
        return value

    def count(self, name: str, path: Path, images: int, expected: int | None) -> None:
        """A line that only counts."""
        self.found.append(FoundSet(name, path, images, expected))

    def check(self, optional: Collection[str] = ()) -> list[str]:
        """Notes on counts that differ and on optional things that are absent.

        Raises:
            MissingDataError: something needed is not there.
            DataError: something is not as it should be, be it optional.
        """
        wrong = [row.error for row in self.found if row.error and not (row.path is None and row.name in optional)]
        if wrong:
            raise type(wrong[0])(" ".join(map(str, wrong)))
        differ = [row for row in self.found if not row.error and row.expected not in (None, row.images)]
        notes = [f"{row.name}: {row.images:,}, not {row.expected:,}." for row in differ]
        return notes + [str(row.error) for row in self.found if row.error]


def data_root(root: PathLike) -> Path:
    """The folder with all data.

    Raises:
        MissingDataError: no such folder.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise MissingDataError(f"There is no folder {str(path)!r}; give the folder that holds the data sets.")
    return path


def relabelled(source: ImageSource, names: Sequence[str], labels: np.ndarray) -> ImageSource:
    """The same images with other labels, into `names`."""
    part = source.subset(slice(None))
    part.label_names = part.label_values = list(names)
    part.labels = np.asarray(labels, np.int64)
    return part
