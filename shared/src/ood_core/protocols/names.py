"""The names of classes in prompts: a file's, a pack's, the benchmark's own or CLIP's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ood_core.data.sources import ParquetImages, PathLike, _path_and_split
from ood_core.errors import DataError
from ood_core.labels import told_apart
from ood_core.prompts import imagenet_names, read_class_names

WNID = re.compile(r"n\d{8}")


def class_names(
    classes: list[str], spec: Mapping[str, Any], root: Path, given: PathLike | None, found: Iterable[Path | None]
) -> list[str]:
    """The names of the class folders.

    Args:
        classes: the folders, by label.
        spec: of the ID set.
        root: the folder with all data.
        given: a file of names.
        found: where the ID images are.
    """
    here = (root / place for place in spec["class_names"])
    path = given or next((place for place in here if place.is_file()), None)
    path = None if path is None else Path(path).expanduser()
    own = dict(spec["classes"]) if isinstance(spec.get("classes"), dict) else {}
    if not spec["wnid_folders"]:
        names = _names_in_order(path, classes) if path else [own.get(name, name) for name in classes]
        return [name.replace("_", " ") for name in names]
    known = clip_names() | _pack_names(found) | own if path is None else _read_names(path, classes)
    if absent := [wnid for wnid in classes if wnid not in known]:
        raise DataError(
            f"{len(absent)} of the {len(classes)} classes, first {absent[0]!r}, have no name "
            f"{'among the 1,000 of ImageNet' if path is None else f'in {str(path)!r}'}; "
            "give a class_names_file with a line for each: wnid, space, name."
        )
    names, clip = [known[wnid].replace("_", " ") for wnid in classes], clip_names()
    return told_apart(names, [clip.get(wnid, name) for wnid, name in zip(classes, names, strict=True)])


def _pack_names(found: Iterable[Path | None]) -> dict[str, str]:
    """The names that a pack gives to its labels."""
    for path in found:
        file, split = _path_and_split(str(path))
        if file.lower().endswith(".parquet"):
            pack = ParquetImages(file, split)
            return {v: n for v, n in zip(map(str, pack.label_values), pack.label_names, strict=True) if v != n}
    return {}


def _names_in_order(path: Path, classes: list[str]) -> list[str]:
    lines = read_class_names(path)
    if len(lines) != len(classes):
        raise DataError(
            f"{str(path)!r} has {len(lines)} names for {len(classes)} classes; "
            f"give one per line, from that of {classes[0]!r} to that of {classes[-1]!r}."
        )
    return lines


@cache
def clip_names() -> dict[str, str]:
    """CLIP's names of the 1,000 classes by wnid, in sorted order."""
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), imagenet_names(), strict=True))


def _read_names(path: Path, wnids: list[str]) -> dict[str, str]:
    lines = read_class_names(path)
    # The readers of the released code split at a space, that of ImageNet-20 at a comma.
    pairs = [re.fullmatch(r"(n\d{8})[\s,]+(.+)", line) for line in lines]
    if found := {pair[1]: pair[2] for pair in pairs if pair}:
        if None in pairs:
            raise DataError(f"{str(path)!r} has the line {lines[pairs.index(None)]!r}; write wnid, space, name.")
        return found
    for order in (wnids, list(clip_names())):
        if len(order) == len(lines):
            return dict(zip(order, lines, strict=True))
    raise DataError(
        f"{str(path)!r} has {len(lines)} names without wnids for {len(wnids)} classes; put wnids before them."
    )
