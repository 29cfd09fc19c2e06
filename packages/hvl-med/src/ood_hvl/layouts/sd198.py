"""SD-198 and its split Skin-40: one folder per class, lists of classes and images."""

from __future__ import annotations

__all__ = ["look_for_sd198", "skin_40"]

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ood_core.data.lists import read_list
from ood_core.data.sources import ImageFolder, ImageSource, PathLike, match_labels
from ood_core.errors import DataError, MissingDataError
from ood_core.prompts import read_class_names
from ood_core.protocols import data_root

from ood_hvl.layouts.survey import Layout, Survey
from ood_hvl.layouts.tasks import split_task

_IMAGES, _CLASSES, _TRAIN, _TEST = "SD-198/images", "skin40_classes.txt", "skin40_train.txt", "skin40_test.txt"
_CLASS_COUNT, _PER_CLASS, _TEST_PER_CLASS = 40, 60, 10


def skin_40(root: PathLike, *, seed: int = 0) -> Layout:
    """Skin-40: 40 classes of SD-198 are known, all images of the others unknown.

    `skin40_classes.txt` (a folder per line), `skin40_train.txt` and `skin40_test.txt` (path and label per line) may be
    beside `SD-198` or in it. Without the first the classes are those of the other two, else the 40 folders with most
    images, by name where these tie. Without the other two, 60 images of each class are drawn, 10 of them to test on;
    of a class with fewer, a sixth. Notes say what is not the official split.

    Args:
        root: the folder with `SD-198/images`.
        seed: of the draw.

    Raises:
        MissingDataError: no such folder, one of the two lists without the other, or listed images that are not there.
        DataError: a list with lines of another form, or with unknown classes.

    Example:
        >>> skin_40("/data").tasks[0].class_names[0]  # doctest: +SKIP
        'Acne Keloidalis Nuchae'
    """
    survey = look_for_sd198(data_root(root))
    notes, source = survey.notes(), survey["images"]
    lists = [survey[name] for name in (_TRAIN, _TEST) if survey[name]]
    classes = survey[_CLASSES] or (_listed_classes(source, lists) if lists else _largest(source, notes))
    train, test = _rows_of(source, lists, classes) if lists else _draw(source, classes, seed, notes)
    names = [name.replace("_", " ") for name in classes]
    rows = (train, test, np.arange(len(source)))
    return Layout(
        "skin-40", source, [split_task("skin-40", source, names, rows, "other classes", notes)], survey.found, notes
    )


def look_for_sd198(root: Path) -> Survey:
    """Images and lists; one of the two lists of images asks for the other."""
    survey, places = Survey(), {name: _place(root, name) for name in (_CLASSES, _TRAIN, _TEST)}
    source = survey.look("images", root / _IMAGES, 6584, _read_images)
    if source is not None:
        survey.look(_CLASSES, places[_CLASSES], _CLASS_COUNT, partial(_read_classes, source), optional=True)
        neither = not any(places[name].is_file() for name in (_TRAIN, _TEST))
        for name in (_TRAIN, _TEST):
            survey.look(name, places[name], None, partial(_read_list, source), optional=neither)
    return survey


def _place(root: Path, name: str) -> Path:
    inside = root / "SD-198" / name
    return inside if inside.is_file() else root / name


def _read_images(folder: Path) -> ImageSource:
    if not folder.is_dir():
        raise MissingDataError(f"there is no folder {str(folder)!r}; ask the authors of SD-198 (ECCV 2016) for it.")
    source = ImageFolder(folder)
    if source.labels is None:
        raise DataError(f"{str(folder)!r} has no folder per class.")
    return source


def _read_classes(source: ImageSource, path: Path) -> list[str]:
    """Folders in the order of the list."""
    lines = read_class_names(path)
    labels, unknown = match_labels(lines, source.label_names)
    if unknown:
        raise DataError(f"{str(path)!r} has {len(unknown)} classes without a folder of images, first {unknown[0]!r}.")
    if len(set(labels)) < len(labels):
        raise DataError(f"{str(path)!r} names a class more than once; leave one line per class.")
    return [source.label_names[label] for label in labels]


def _read_list(source: ImageSource, path: Path) -> list[tuple[int, str]]:
    """(row, label) of every line."""
    if not path.is_file():
        raise MissingDataError(f"there is no file {str(path)!r}.")
    lines, row = read_list(path), {id: position for position, id in enumerate(source.ids)}
    ids = ["/".join(image.replace("\\", "/").split("/")[-2:]) for image, _ in lines]
    if absent := [id for id in ids if id not in row]:
        raise MissingDataError(
            f"{len(absent):,} of the {len(ids):,} images of {str(path)!r} are not there, first {absent[0]!r}."
        )
    return [(row[id], label) for id, (_, label) in zip(ids, lines, strict=True)]


Lists = Sequence[list[tuple[int, str]]]


def _listed_classes(source: ImageSource, lists: Lists) -> list[str]:
    """Folders in the order of their labels."""
    pairs = {(label, _folder(source, row)) for rows in lists for row, label in rows}
    for column in (0, 1):
        values = [pair[column] for pair in pairs]
        if twice := sorted(value for value in values if values.count(value) > 1):
            both = sorted(pair[1 - column] for pair in pairs if pair[column] == twice[0])
            raise DataError(f"{_TRAIN} and {_TEST} put {twice[0]!r} with both {both[0]!r} and {both[1]!r}.")
    numbered = all(label.isdecimal() for label, _ in pairs)
    return [folder for _, folder in sorted(pairs, key=lambda pair: (int(pair[0]) if numbered else 0, pair[1]))]


def _folder(source: ImageSource, row: int) -> str:
    return source.ids[row].partition("/")[0]


def _largest(source: ImageSource, notes: list[str]) -> list[str]:
    """The folders with most images, in the order of their names."""
    labels = np.asarray(source.labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(source.label_names))
    if len(counts) <= _CLASS_COUNT:
        raise DataError(
            f"SD-198 has {len(counts)} class folders here, and {_CLASS_COUNT} known ones leave none unknown; "
            f"add the others, or name the known classes in {_CLASSES}."
        )
    notes.append(f"The classes are the {_CLASS_COUNT} with most images: not the official choice of Skin-40.")
    order = sorted(range(len(counts)), key=lambda label: (-counts[label], source.label_names[label]))
    return sorted(source.label_names[label] for label in order[:_CLASS_COUNT])


Split = tuple[np.ndarray, np.ndarray]


def _rows_of(source: ImageSource, lists: Lists, classes: list[str]) -> Split:
    for row, _ in (pair for rows in lists for pair in rows):
        if _folder(source, row) not in classes:
            raise DataError(f"The lists hold {source.ids[row]!r}, which is of none of the {len(classes)} classes.")
    train, test = (np.array([row for row, _ in rows], np.int64) for rows in lists)
    return train, test


def _draw(source: ImageSource, classes: list[str], seed: int, notes: list[str]) -> Split:
    """60 images of every class in the order of their names, the first 10 of them, or a sixth, to test on."""
    generator, train, test = random.Random(seed), [], []
    for name in sorted(classes):
        members = np.flatnonzero(source.labels == source.label_names.index(name)).tolist()
        if len(members) < 2:
            raise DataError(f"Class {name!r} has {len(members)} images; at least 2 are needed, one to test on.")
        drawn = generator.sample(members, min(len(members), _PER_CLASS))
        cut = max(1, len(drawn) * _TEST_PER_CLASS // _PER_CLASS)
        test += drawn[:cut]
        train += drawn[cut:]
    notes.append(f"The images are drawn with seed {seed}: not the official split of Skin-40.")
    return np.array(train, np.int64), np.array(test, np.int64)
