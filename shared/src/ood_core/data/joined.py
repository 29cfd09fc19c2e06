"""Several sources as one."""

from __future__ import annotations

__all__ = ["JoinedSources"]

from collections.abc import Mapping

import numpy as np

from ood_core.data.sources import Derived, ImageSource


class JoinedSources(Derived):
    """The images of several sources; ids start with the name of theirs, labels are the same where names are.

    Args:
        sources: by name.

    Example:
        >>> joined = JoinedSources({"train": ImageFolder("a"), "test": ImageFolder("b")})  # doctest: +SKIP
        >>> joined.ids[0]  # doctest: +SKIP
        'test/cat/1.jpg'
    """

    def __init__(self, sources: Mapping[str, ImageSource]) -> None:
        self.sources = dict(sources)
        self.place = ", ".join(source.place for source in sources.values())
        items = [(name, index) for name, source in sources.items() for index in range(len(source))]
        ids = [f"{name}/{sources[name].ids[index]}" for name, index in items]
        super().__init__(ids, items, [_label(sources[name], index) for name, index in items])

    def rows_of(self, name: str) -> np.ndarray:
        """int64, where the images of a source are."""
        return np.array([row for row, (own, _) in enumerate(self._items) if own == name], np.int64)

    def _origin(self, item: tuple[str, int]) -> tuple[ImageSource, int]:
        return self.sources[item[0]], item[1]


def _label(source: ImageSource, index: int) -> str | None:
    label = -1 if source.labels is None else source.labels[index]
    return None if label < 0 else source.label_names[label]
