"""A task: the rows of one source to train on, to test on, and of unknown classes; and the folds that make tasks."""

from __future__ import annotations

__all__ = ["FOLDS", "Task", "fold_tasks", "folds", "split_task"]

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from ood_core.data.sources import ImageSource
from ood_core.errors import DataError, UsageError, unknown_name

if TYPE_CHECKING:
    from ood_core.features import FeatureSet

FOLDS = ("grouped", "stratified")
"""Kinds of folds: no lesion in two of them, or as the paper has them."""


@dataclass(frozen=True)
class Task:
    """Known classes to train and test on, and images of unknown ones.

    Attributes:
        name: unique in its layout, with the kind and the number of the fold if it is one.
        class_names: C names, in the order of the labels 0..C-1.
        source: every image of the layout, the same object in all its tasks.
        rows: int64 rows of `source`, ascending: "train", "test", then the OOD sets by name.
        notes: what a result must say of the task.

    Raises:
        DataError: a part without images, an image in two parts, or a class without an image to train on.
    """

    name: str
    class_names: list[str]
    source: ImageSource
    rows: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part, rows in self.rows.items():
            if not len(rows):
                raise DataError(f"{self.name}: there is no image for {part!r}.")
        for (one, rows), (other, others) in combinations(self.rows.items(), 2):
            if len(both := np.intersect1d(rows, others)):
                image = self.source.ids[both[0]]
                raise DataError(f"{self.name}: {len(both)} images are in {one!r} and {other!r}, first {image!r}.")
        if absent := set(range(len(self.class_names))) - set(self.labels[self.rows["train"]].tolist()):
            raise DataError(f"{self.name}: there is no image of class {self.class_names[min(absent)]!r} to train on.")

    @cached_property
    def labels(self) -> np.ndarray:
        """int64, one per row of `source`: the position in `class_names`, -1 for unknown classes."""
        return np.asarray(self.source.with_labels_from(self.class_names).labels)

    @property
    def train(self) -> ImageSource:
        """The images to train on, labelled by `class_names`."""
        return self._known("train")

    @property
    def test(self) -> ImageSource:
        """The images of known classes to test on, labelled by `class_names`."""
        return self._known("test")

    def _known(self, part: str) -> ImageSource:
        return self.source.with_labels_from(self.class_names).subset(self.rows[part])

    @property
    def ood(self) -> dict[str, ImageSource]:
        """The images of unknown classes by set, with the labels of `source`, which say what they are."""
        return {name: self.source.subset(rows) for name, rows in self.rows.items() if name not in ("train", "test")}

    def describe(self) -> str:
        """Its name and its numbers of classes and images."""
        parts = ", ".join(f"{part} {len(rows):,}" for part, rows in self.rows.items())
        return f"{self.name}: {len(self.class_names)} classes, {parts}"

    def rows_among(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Where the images of every part stand among `ids`; those that are not there are left out.

        Args:
            ids: image ids in the order of an array that holds something for each, such as `FeatureSet.ids`, which
                lacks the images that could not be decoded.

        Returns:
            int64 positions by part, in the order of `rows`.
        """
        at = {id: position for position, id in enumerate(ids)}
        return {part: np.array([at[id] for id in self._ids(part) if id in at], np.int64) for part in self.rows}

    def _ids(self, part: str) -> list[str]:
        return [self.source.ids[row] for row in self.rows[part]]

    def features(self, whole: FeatureSet) -> dict[str, FeatureSet]:
        """The parts of the features of `source`, joined by id.

        Args:
            whole: what `extract` made of `source`, failures recorded or not.

        Returns:
            By part; labels as those of `train`, `test` and `ood`, failures those of the part's images.

        Raises:
            DataError: features of other images.

        Example:
            >>> parts = task.features(extract(backbone, layout.source, {"pyramid"}))  # doctest: +SKIP
            >>> list(parts)  # doctest: +SKIP
            ['train', 'test', 'BCC+AK+BKL+SCC']
        """
        known = {*whole.ids, *(id for id, _ in whole.failures)}
        used = [id for part in self.rows for id in self._ids(part)]
        if absent := [id for id in used if id not in known]:
            raise DataError(
                f"{self.name}: the features lack {len(absent)} of its {len(used)} images, first {absent[0]!r}; "
                "extract them from the source of the layout."
            )
        return {part: self._part(whole, part, at) for part, at in self.rows_among(whole.ids).items()}

    def _part(self, whole: FeatureSet, part: str, at: np.ndarray) -> FeatureSet:
        ids = set(self._ids(part))
        found = replace(whole[at], failures=[failure for failure in whole.failures if failure[0] in ids])
        if part not in ("train", "test"):
            return found
        from ood_core.features import label_table  # with torch, which a task needs nowhere else

        labels = label_table(found.label_names, self.class_names)[found.labels]
        return replace(found, labels=labels, label_names=list(self.class_names))


def folds(
    labels: Any,
    groups: Sequence[Any] | None = None,
    *,
    kind: str = "grouped",
    count: int = 5,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut images into folds with the same share of every class.

    Args:
        labels: int64 [N].
        groups: what an image belongs to (its lesion, its patient), one each; None for one of its own. Without it the
            folds are stratified, whatever the kind.
        kind: "grouped" keeps a group in one fold (`StratifiedGroupKFold`), "stratified" knows no groups
            (`StratifiedKFold`).
        count: of folds.
        seed: of their shuffling.
        class_names: what errors call the labels.

    Returns:
        (rows to train on, rows to test on) of each fold, ascending.

    Raises:
        UsageError: an unknown kind, or fewer than two folds.
        DataError: a class with fewer images, or groups, than folds.

    Example:
        >>> train, test = folds([0, 0, 1, 1, 0, 1], list("aabbcd"), count=2)[0]
        >>> len(test)
        3
    """
    if kind not in FOLDS:
        raise unknown_name("kind of folds", kind, FOLDS)
    if count < 2:
        raise UsageError(f"fold_count={count}: at least 2 folds are needed.")
    labels = np.asarray(labels, np.int64)
    numbers = None if groups is None or kind == "stratified" else _numbers(groups)
    _check_counts(labels, numbers, count, class_names)
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter = StratifiedKFold if numbers is None else StratifiedGroupKFold
    cut = splitter(count, shuffle=True, random_state=seed).split(labels, labels, numbers)
    return [(np.sort(train).astype(np.int64), np.sort(test).astype(np.int64)) for train, test in cut]


def _numbers(groups: Sequence[Any]) -> np.ndarray:
    """Groups numbered as they come; an image without one has a number to itself."""
    number: dict[Any, int] = {}
    keys = [("alone", position) if group is None else ("group", group) for position, group in enumerate(groups)]
    return np.array([number.setdefault(key, len(number)) for key in keys], np.int64)


def _check_counts(
    labels: np.ndarray, numbers: np.ndarray | None, count: int, class_names: Sequence[str] | None
) -> None:
    units, kind = (np.arange(len(labels)), "images") if numbers is None else (numbers, "lesions (groups of images)")
    for label in np.unique(labels).tolist():
        if (found := len(np.unique(units[labels == label]))) < count:
            name = label if class_names is None else repr(class_names[label])
            raise DataError(
                f"Class {name} has {found} {kind}, too few for {count} folds; add images, hold the class out, or "
                "take fewer folds."
            )


def split_task(
    name: str,
    source: ImageSource,
    class_names: list[str],
    rows: Sequence[np.ndarray],
    ood: str,
    notes: list[str],
) -> Task:
    """The task of some known classes; images of all other classes are unknown, those without a label are left out.

    Args:
        name: of the task.
        source: every image of the layout.
        class_names: the known classes.
        rows: three: where known images to train on, known images to test on and unknown images are taken from.
        ood: name of the OOD set.
        notes: of the task.
    """
    known = np.asarray(source.with_labels_from(class_names).labels) >= 0
    unknown = ~known & (np.asarray(source.labels) >= 0)
    parts = dict(zip(("train", "test", ood), rows, strict=True))
    taken = {part: at[(unknown if part == ood else known)[at]] for part, at in parts.items()}
    return Task(name, class_names, source, {part: np.sort(at).astype(np.int64) for part, at in taken.items()}, notes)


def fold_tasks(
    name: str,
    source: ImageSource,
    class_names: list[str],
    groups: Sequence[Any] | None,
    ood: str,
    notes: list[str],
    **options: Any,
) -> list[Task]:
    """A task per fold of the images of known classes; every fold has all unknown images. Options: see `folds`."""
    labels = np.asarray(source.with_labels_from(class_names).labels)
    known = np.flatnonzero(labels >= 0)
    own = None if groups is None else [groups[row] for row in known.tolist()]
    cut = folds(labels[known], own, class_names=class_names, **options)
    kind = "stratified" if groups is None else options["kind"]
    notes, everywhere = [*notes, _NOTES[kind if groups is not None else "no groups"]], np.arange(len(source))
    return [
        split_task(f"{name}-{kind}-{number}", source, class_names, [known[train], known[test], everywhere], ood, notes)
        for number, (train, test) in enumerate(cut, 1)
    ]


_NOTES = {
    "no groups": "No lesion ids are known: the folds are stratified, a lesion may be in both train and test.",
    "stratified": "The folds are stratified as in the paper: images of a lesion may be in both train and test.",
    "grouped": "The folds are grouped: no lesion is in both train and test.",
}
