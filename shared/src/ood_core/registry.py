"""What installed packages add by entry points: detectors, backbones, edits of backbones, protocols."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ood_core.errors import OODError, UsageError, unknown_name

__all__ = ["BACKBONES", "DETECTORS", "EDITS", "PROTOCOLS", "SAVED_DETECTORS", "Registry"]


@dataclass(frozen=True)
class Registry:
    """Objects by name, imported when they are asked for; one that cannot be imported hides no other.

    Attributes:
        group: of the entry points, `name = "package.module:object"`.
        kind: what they are, for messages.

    Example:
        >>> "mcm" in DETECTORS.names()
        True
    """

    group: str
    kind: str

    @cached_property
    def entries(self) -> dict[str, EntryPoint]:
        """Entry points by name."""
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """All names, sorted, whether they can be imported or not."""
        return sorted(self.entries)

    def load(self, name: str) -> Any:
        """The object of a name.

        Raises:
            UsageError: an unknown name, or one whose package cannot be imported.
        """
        if name not in self.entries:
            raise unknown_name(self.kind, name, self.names())
        entry = self.entries[name]
        try:
            return entry.load()
        except OODError:  # says already what is missing
            raise
        except Exception as error:
            raise UsageError(
                f"{self.kind.capitalize()} {name!r} ({entry.value}) cannot be imported: {error}"
            ) from error

    def broken(self) -> dict[str, str]:
        """Names whose package cannot be imported, with the error of each."""
        broken = {}
        for name, entry in self.entries.items():
            try:
                entry.load()
            except Exception as error:
                broken[name] = f"{type(error).__name__}: {error}"
        return broken

    def forget(self) -> None:
        """Look anew at what is installed, the next time."""
        self.__dict__.pop("entries", None)


DETECTORS = Registry("ood.detectors", "detector")
"""Classes of detectors that `create_detector` makes."""

SAVED_DETECTORS = Registry("ood.saved_detectors", "saved detector")
"""Classes that are made from other detectors, so not by name, but saved and loaded like the others."""

BACKBONES = Registry("ood.backbones", "backbone")
"""Functions (name, spec=) -> Backbone by the library that a spec begins with, "LIBRARY:NAME"."""

EDITS = Registry("ood.edits", "edit")
"""Functions (backbone, folder) -> Backbone by the `kind` in a folder's edit.json."""

PROTOCOLS = Registry("ood.protocols", "protocol")
"""`ContributedProtocol` by name."""
