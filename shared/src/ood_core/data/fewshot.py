"""Few-shot sets: the same few images of every class, whatever the machine."""

from __future__ import annotations

__all__ = ["FewShot"]

import json
import os
import random
from pathlib import Path
from typing import Any, Self

import numpy as np

from ood_core.data.sources import Derived, ImageSource
from ood_core.errors import DataError, MissingDataError, UsageError
from ood_core.files import write_json


class FewShot(Derived):
    """`shots` images of every class, drawn class after class from the images in the order of their ids.

    The draw is that of the released few-shot code: one `random.Random(seed)`, one `sample` per class in
    ascending order. The images stand class by class, as drawn.

    Args:
        source: a labelled source; unlabelled images in it are left out.
        shots: images per class; a class that has fewer keeps them all.
        seed: which ones.

    Attributes:
        short_classes: label name -> number of images, of the classes with fewer than `shots`.

    Raises:
        UsageError: `shots` below 1.
        DataError: no labels, or a class without any image.

    Example:
        >>> few = FewShot(ImageFolder("train"), shots=4, seed=1)  # doctest: +SKIP
        >>> few.save("shots.json")  # doctest: +SKIP
    """

    labels: np.ndarray

    def __init__(self, source: ImageSource, shots: int, seed: int) -> None:
        if shots < 1:
            raise UsageError(f"shots={shots}: at least 1 image per class is needed.")
        generator = random.Random(seed)
        drawn = []
        for members in _members_by_class(source):
            drawn += generator.sample(members, shots) if len(members) >= shots else members
        self._take(source, drawn, shots, seed)

    def _take(self, source: ImageSource, drawn: list[int], shots: int, seed: int) -> None:
        part = source.subset(drawn)
        self.ids, self.labels = part.ids, np.asarray(part.labels)
        self.label_names, self.label_values = source.label_names, source.label_values
        self.place = source.place
        self._items, self.source, self.shots, self.seed = drawn, source, shots, seed
        counts = np.bincount(self.labels, minlength=len(source.label_names)).tolist()
        self.short_classes = {n: c for n, c in zip(source.label_names, counts, strict=True) if c < shots}

    def _origin(self, item: int) -> tuple[ImageSource, int]:
        return self.source, item

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write seed, shots and the ids of every class as JSON; the file is replaced at one stroke."""
        classes: list[dict[str, Any]] = [{"name": name, "ids": []} for name in self.label_names]
        for id, label in zip(self.ids, self.labels.tolist(), strict=True):
            classes[label]["ids"].append(id)
        write_json(Path(path), {"seed": self.seed, "shots": self.shots, "classes": classes})

    @classmethod
    def load(cls, path: str | os.PathLike[str], source: ImageSource) -> Self:
        """The set saved at `path`, from a source that holds its images under the same ids and label names.

        Raises:
            MissingDataError: no such file.
            DataError: not such a file, or an image that the source lacks or labels otherwise.
        """
        seed, shots, wanted = _read_saved(Path(path))
        position = {id: index for index, id in enumerate(source.ids)}
        if missing := [id for _, id in wanted if id not in position]:
            raise DataError(f"{path} names {len(missing)} images that are not in the source, first {missing[0]!r}.")
        drawn = [position[id] for _, id in wanted]
        labels = [-1] * len(source) if source.labels is None else source.labels.tolist()
        names = [*source.label_names, None]
        for (name, id), index in zip(wanted, drawn, strict=True):
            if names[labels[index]] != name:
                raise DataError(f"{path} says {name!r} of {id!r}, the source says {names[labels[index]]!r}.")
        few = cls.__new__(cls)
        few._take(source, drawn, shots, seed)
        return few


def _read_saved(path: Path) -> tuple[int, int, list[tuple[str, str]]]:
    """Seed, shots and (label name, id) of every image."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        wanted = [(entry["name"], id) for entry in saved["classes"] for id in entry["ids"]]
        return saved["seed"], saved["shots"], wanted
    except FileNotFoundError:
        raise MissingDataError(f"There is no file {str(path)!r} with few-shot ids.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} holds no saved few-shot set: {error!r}.") from error


def _members_by_class(source: ImageSource) -> list[list[int]]:
    """Positions of each class's images, in the order of their ids."""
    if source.labels is None:
        raise DataError("A few-shot set needs labelled images: one folder per class, or a label column.")
    members: list[list[int]] = [[] for _ in source.label_names]
    for index in sorted(range(len(source)), key=source.ids.__getitem__):
        if source.labels[index] >= 0:
            members[source.labels[index]].append(index)
    if empty := [name for name, found in zip(source.label_names, members, strict=True) if not found]:
        raise DataError(f"Class {empty[0]!r} has no image to draw from.")
    return members
