"""What was looked for on a disk and what was found; and the layout that is made of it."""

from __future__ import annotations

__all__ = ["Layout", "Survey"]

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ood_core.data.sources import ImageSource
from ood_core.protocols import FoundSet, check_found, describe

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
        found = [describe(self.found)] if self.found else []
        tasks = [task.describe() for task in self.tasks]
        return "\n".join([head, *found, *tasks, *(f"Note: {note}" for note in notes)])


@dataclass
class Survey:
    """What was found of a benchmark, one thing after another."""

    found: list[FoundSet] = field(default_factory=list)

    def look(self, name: str, path: Path, expected: int | None, read: Callable[[Path], Any], **options: Any) -> Any:
        """What `read` makes of the path, or None where it cannot; see `FoundSet.read`."""
        self.found.append(FoundSet.read(name, path, expected, read, **options))
        return self.found[-1].content

    def __getitem__(self, name: str) -> Any:
        """What was read under a name, or None."""
        return next((row.content for row in self.found if row.name == name), None)

    def notes(self) -> list[str]:
        """Counts that differ, and optional things that are absent.

        Raises:
            MissingDataError, DataError: something needed that is not there, or something that cannot be used.
        """
        check_found(self.found)
        differ = [f"{row.name}: {row.images:,}, not {row.expected:,}." for row in self.found if row.differs]
        return differ + [str(row.error) for row in self.found if row.error]
