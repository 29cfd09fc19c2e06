"""Any folder or manifest, with some of its classes held out as the unknown ones."""

from __future__ import annotations

__all__ = ["leave_classes_out"]

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ood_core.data.joined import JoinedSources
from ood_core.data.sources import ImageSource, Manifest, ParquetImages, PathLike, match_labels, open_source
from ood_core.errors import DataError, UsageError, unknown_name
from ood_core.protocols import FoundSet

from ood_hvl.layouts.survey import Layout
from ood_hvl.layouts.tasks import FOLDS, fold_tasks, split_task

_LESION = "lesion_id"


def leave_classes_out(
    source: ImageSource | PathLike,
    held_out: Sequence[str] | Sequence[Sequence[str]],
    *,
    test: ImageSource | PathLike | None = None,
    groups: str | Mapping[str, str] | None = None,
    folds: str = "grouped",
    fold_count: int = 5,
    seed: int = 0,
) -> Layout:
    """Images of which some classes are never trained on.

    With `test`, the known classes of `source` are trained on, and known and held-out ones of `test` are tested on.
    Without it, the known images are cut into folds, and each is tested on with all held-out images.

    Args:
        source: a folder with one folder per class, a manifest, `FILE.parquet[:split]`, or an opened source.
        held_out: classes; or several such lists, a task for each (with folds: for each and every fold).
        test: other images.
        groups: the column of lesion ids (of patients, ...) in a manifest or parquet file, by default `lesion_id` if
            it is there; or the lesion of every image id that has one. For folds only.
        folds: "grouped": no lesion in two folds, where lesion ids are known; or "stratified".
        fold_count: number of folds.
        seed: of the folds.

    Raises:
        UsageError: an unknown class, fewer than two known ones, an unknown kind of folds, or both `groups` and `test`.
        MissingDataError: no such file or folder.
        DataError: images without labels, a class with too few images, or no column of that name.

    Example:
        >>> layout = leave_classes_out("ham.parquet:train", ["bcc", "bkl"], test="ham.parquet:test")  # doctest: +SKIP
        >>> layout.tasks[0].name  # doctest: +SKIP
        'leave-out-bcc+bkl'
    """
    if folds not in FOLDS:
        raise unknown_name("kind of folds", folds, FOLDS)
    if groups is not None and test is not None:
        raise UsageError("groups= keeps lesions together in folds, and test= leaves nothing to cut; give one of them.")
    given = {"images": source} if test is None else {"train": source, "test": test}
    opened = {name: open_source(spec) for name, spec in given.items()}
    whole = opened["images"] if test is None else JoinedSources(opened)
    found = [_found(name, spec, opened[name]) for name, spec in given.items() if not isinstance(spec, ImageSource)]
    notes = _notes(whole)
    sets = [_known_names(whole, names) for names in _nested(held_out)]
    if isinstance(whole, JoinedSources):
        train, unseen = (whole.rows_of(part) for part in ("train", "test"))
        tasks = [
            split_task(f"leave-out-{out}", whole, known, (train, unseen, unseen), out, notes) for known, out in sets
        ]
    else:
        lesions = _lesions(source, whole, groups)
        options: dict[str, Any] = {"kind": folds, "count": fold_count, "seed": seed}
        cut = [fold_tasks(f"leave-out-{out}", whole, known, lesions, out, notes, **options) for known, out in sets]
        tasks = [task for of_set in cut for task in of_set]
    return Layout("leave-classes-out", whole, tasks, found, notes)


def _nested(held_out: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """A list of classes per task."""
    if isinstance(held_out, str):
        raise UsageError(f"held_out={held_out!r} must be a list of classes, as [{held_out!r}].")
    flat = [isinstance(entry, str | int) for entry in held_out]
    if any(flat) and not all(flat):
        raise UsageError(f"held_out={held_out!r} mixes classes and lists of classes; give a list for each task.")
    sets = [[str(name) for name in names] for names in ([held_out] if any(flat) else held_out)]
    if not sets or not all(sets):
        raise UsageError(f"held_out={held_out!r} must name at least one class for each task.")
    return sets


def _known_names(whole: ImageSource, held_out: list[str]) -> tuple[list[str], str]:
    """The known classes as prompts have them, and the held-out ones by the names of their labels, as one."""
    if whole.labels is None:
        raise DataError("The images have no labels to hold classes out of; use one folder per class.")
    positions, unknown = match_labels(held_out, whole.label_names)
    if unknown:
        raise unknown_name("class", unknown[0], whole.label_names)
    out = sorted({whole.label_names[position] for position in positions})
    known = [name.replace("_", " ") for name in whole.label_names if name not in out]
    if len(known) < 2:
        raise UsageError(
            f"Without {', '.join(out)} there are {len(known)} classes to tell apart; at least 2 must be known."
        )
    return known, "+".join(out)


def _lesions(spec: Any, whole: ImageSource, groups: str | Mapping[str, str] | None) -> list[Any] | None:
    """What every image belongs to, None where nothing says so; None if nothing says so of any."""
    if isinstance(groups, Mapping):
        return [groups.get(id) for id in whole.ids]
    column = groups or _LESION
    try:
        same = _with_labels(spec, whole, column)
    except DataError:
        if groups:
            raise
        return None
    if same is None and groups:
        raise UsageError(f"groups={groups!r} names a column, which only a manifest or parquet file has.")
    if same is None or same.labels is None:
        return None
    return [None if label < 0 else int(label) for label in same.labels]


def _with_labels(spec: Any, whole: ImageSource, column: str) -> ImageSource | None:
    """The same images in the same order, labelled by another column; None if there are no columns."""
    if isinstance(spec, ImageSource) or not isinstance(whole, Manifest | ParquetImages):
        return None
    if isinstance(whole, Manifest):
        return Manifest(spec, label=column)
    return ParquetImages(whole.file, whole.split, label=column)


def _found(name: str, spec: PathLike, source: ImageSource) -> FoundSet:
    return FoundSet(name, Path(os.fspath(spec)), len(source), None, None, source)


def _notes(whole: ImageSource) -> list[str]:
    count = 0 if whole.labels is None else int((whole.labels < 0).sum())
    return [f"{count:,} images without a label are left out."] if count else []
