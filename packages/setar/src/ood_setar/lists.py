"""The lists of images and labels that the released code keeps in `data/`, read as they are."""

from __future__ import annotations

__all__ = ["accuracy", "read_list", "with_labels"]

import json
import logging
import os
import posixpath
from collections.abc import Iterable
from typing import Any

import numpy as np
from ood_core.backbones.base import Backbone
from ood_core.data.decode import printable
from ood_core.data.sources import FileSource, ImageSource, PathLike
from ood_core.errors import DataError, MissingDataError
from ood_core.features import extract
from ood_core.prompts import text_features

log = logging.getLogger(__name__)


def read_list(path: PathLike, root: PathLike) -> ImageSource:
    """The images of a list such as `voc_val_data.json`: {folder: [file, ...]}.

    Args:
        path: the JSON file.
        root: the folder that holds the folders of the list, as `ID_VOC_single` or `OOD_Sun/test`.

    Returns:
        The images, sorted by id; the first folder is the label, as in `ImageFolder`.

    Raises:
        MissingDataError: no such file, or listed images that are not below `root`.
        DataError: no such list, a list without images, or an image listed twice.

    Example:
        >>> len(read_list("data/ID_VOC/voc_val_data.json", "ID_VOC_single"))  # doctest: +SKIP
        94
    """
    files = [posixpath.normpath(f"{folder or '.'}/{name}") for folder, names in _folders(path) for name in names]
    if not files:
        raise DataError(f"{_quoted(path)} lists no image; give a list with at least one.")
    source = _ListedImages(files, os.fspath(root))
    if missing := [
        file for file in files if file.startswith(("/", "../")) or not os.path.isfile(os.path.join(root, file))
    ]:
        raise MissingDataError(
            f"{len(missing):,} of the {len(files):,} images in {_quoted(path)} are not below {_quoted(root)}, "
            f"first {missing[0]!r}; give the folder that holds the folders of the list."
        )
    return source


class _ListedImages(FileSource):
    """Files below `root`; ids and labels as `ImageFolder` would have them."""

    def __init__(self, files: list[str], root: str) -> None:
        ids = list(map(printable, files))
        labels = [id.partition("/")[0] if "/" in id else None for id in ids]
        super().__init__(ids, [os.path.join(root, file) for file in files], labels)


def _folders(path: PathLike) -> Iterable[tuple[str, list[str]]]:
    content = _read_object(path, "{folder: [file, ...]}")
    for folder, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{_quoted(path)} has {names!r:.80} under {folder!r}, not a list of file names.")
    return content.items()


def with_labels(source: ImageSource, path: PathLike) -> ImageSource:
    """The images of `source` with the labels of a file such as `sun_test_label.json`: {path of the image: label}.

    Images without a label are left out, and a warning in the log counts them. The label names are all those of
    the file in sorted order. Names that differ in capitals only ("Cardigan", "cardigan") are one, spelled as the
    first: their prompts read alike to CLIP. The paths in the file may start with one folder that the ids lack, as
    "images/" of the released files does where the protocols find `OOD_Sun/test/images`.

    Args:
        source: the images.
        path: the JSON file.

    Raises:
        MissingDataError: no such file.
        DataError: no such file of labels, one without labels, or without a label for any of the images.

    Example:
        >>> sun = find_protocol("setar-imagenet-1k", "/data").ood["SUN"]  # doctest: +SKIP
        >>> len(with_labels(sun, "data/OOD_Sun/sun_test_label.json").label_names)  # doctest: +SKIP
        44
    """
    labels = _read_labels(path)
    names, number = _merge(labels.values())
    labels = _at_level_of(source.ids, labels)
    chosen = [index for index, id in enumerate(source.ids) if id in labels]
    if not chosen:
        raise DataError(
            f"{_quoted(path)} has a label for none of the {len(source):,} images, as {source.ids[0]!r}: "
            f"its paths are as {next(iter(labels))!r}. Open the images from the folder that these start in."
        )
    if absent := len(source) - len(chosen):
        log.warning("%s of %s images have no label in %s: left out.", f"{absent:,}", f"{len(source):,}", _quoted(path))
    part = source.subset(chosen)
    part.label_names = part.label_values = names
    part.labels = np.array([number[labels[id].casefold()] for id in part.ids], np.int64)
    return part


def _read_labels(path: PathLike) -> dict[str, str]:
    labels = _read_object(path, "{path of the image: label}")
    if wrong := [image for image, label in labels.items() if not isinstance(label, str) or not label]:
        raise DataError(f"{_quoted(path)} has {labels[wrong[0]]!r:.80} under {wrong[0]!r}, not the name of a label.")
    if not labels:
        raise DataError(f"{_quoted(path)} holds no label; give a file with at least one.")
    return labels


def _merge(labels: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The names in order, and the number of each by its spelling without capitals."""
    first: dict[str, str] = {}
    for label in sorted(set(labels)):
        first.setdefault(label.casefold(), label)
    return list(first.values()), {folded: number for number, folded in enumerate(first)}


def _at_level_of(ids: list[str], labels: dict[str, str]) -> dict[str, str]:
    """The labels by id: without the folder that all their paths share, where they fit no id with it."""
    below = {path.partition("/")[2]: label for path, label in labels.items()}
    share_one = len({path.partition("/")[0] for path in labels}) == 1 and "" not in below
    return below if share_one and labels.keys().isdisjoint(ids) and not below.keys().isdisjoint(ids) else labels


def _read_object(path: PathLike, form: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise MissingDataError(f"There is no file {_quoted(path)}; check the path.")
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except ValueError as error:
        raise DataError(f"{_quoted(path)} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{_quoted(path)} holds {content!r:.80}, not an object of the form {form}.")
    return content


def _quoted(path: PathLike) -> str:
    return repr(printable(os.fspath(path)))


def accuracy(backbone: Backbone, source: ImageSource, template: str, **extraction: Any) -> float:
    """Share of images whose label is the nearest of all label names.

    Args:
        backbone: with a text tower.
        source: labelled.
        template: prompt of a label.
        **extraction: for `extract`.
    """
    features = extract(backbone, source, needs={"image"}, **extraction)
    text = text_features(backbone, source.label_names, template).to(features.image.device)
    return (features.image @ text.T).argmax(1).eq(features.labels).double().mean().item()
