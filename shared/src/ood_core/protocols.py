"""Benchmarks of the papers, found as they lie on a user's disk.

What is looked for stands in `protocols_data/*.json`. "protocols" name an ID set and, by OOD set, the split taken.
"sets" have: `folders` by split, of which the first that is there counts; `images` expected by split; where they are
`published`. A set with one folder per class also has `class_count` and files of `class_names`. Where `wnid_folders`
is true these folders are named by WordNet id, and a set of some classes only has: `subset_of` another set, whose
folders are looked up after its own, with either `half` of the classes or a list of `classes` (with or without names)
that a file `class_list` replaces. Elsewhere `classes` are the names of the folders, in the order of the labels.
"""

from __future__ import annotations

__all__ = ["FoundSet", "Protocol", "describe", "find_protocol", "inspect_protocol", "list_protocols"]

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ood_core.data.sources import ImageSource, PathLike, open_source
from ood_core.errors import DataError, MissingDataError, UsageError, unknown_name
from ood_core.prompts import imagenet_names, read_class_names

_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class FoundSet:
    """One image set of a protocol, found or not.

    Attributes:
        name: "train", "test" or the name of an OOD set.
        path: where it was found.
        images: how many were found.
        expected: how many the paper's set has; None where that is not known.
        error: why it cannot be used.
        source: the images.
    """

    name: str
    path: Path | None
    images: int
    expected: int | None
    error: MissingDataError | DataError | None = None
    source: ImageSource | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Protocol:
    """A benchmark on this disk.

    Attributes:
        name: as in `list_protocols`.
        title: the ID set as the papers call it.
        class_names: C names, in the order of the labels 0..C-1.
        wnids: C WordNet ids, in the same order; none where the class folders have names.
        train: ID training images, or None; its `label_names` are the class names, as are those of `test`.
        test: ID test images.
        ood: OOD images by name, in the paper's order.
        found: the same sets with paths and counts.
        notes: what differs from the paper's benchmark.
    """

    name: str
    title: str
    class_names: list[str]
    wnids: list[str]
    train: ImageSource | None
    test: ImageSource
    ood: dict[str, ImageSource]
    found: list[FoundSet]
    notes: list[str]

    def describe(self) -> str:
        """What was found where, for people."""
        head = f"{self.name}: {len(self.class_names)} classes, {self.class_names[0]!r} to {self.class_names[-1]!r}"
        return "\n".join([head, describe(self.found), *(f"Note: {note}" for note in self.notes)])


def list_protocols() -> list[str]:
    """The known protocols.

    Example:
        >>> list_protocols()[:2]
        ['imagenet-1k', 'imagenet-500-easy']
    """
    return list(_data()["protocols"])


def inspect_protocol(name: str, root: PathLike, overrides: Mapping[str, PathLike] | None = None) -> list[FoundSet]:
    """Look for the sets of a protocol without asking that they be there: the dry run of `find_protocol`.

    Args:
        name: of `list_protocols`.
        root: the folder with all data.
        overrides: other places, by "train", "test", OOD set or "class_list" (a file of wnids, one per line). An
            image set may be a folder or whatever else `open_source` takes; an ID set has wnids, or the names of
            the protocol's class folders, as labels.

    Returns:
        "train", "test" and the OOD sets in the paper's order.

    Raises:
        UsageError: an unknown protocol, or an override of a set that it does not have.
        MissingDataError: no such root.

    Example:
        >>> print(describe(inspect_protocol("imagenet-1k", "/data")))  # doctest: +SKIP
        train  1,281,167 of 1,281,167  /data/imagenet/train
    """
    return _inspect(name, root, overrides)[0]


def describe(found: Sequence[FoundSet]) -> str:
    """A line per set: counts and place, or what is wrong.

    Example:
        >>> print(describe([FoundSet("SUN", Path("/data/SUN"), 9_999, 10_000)]))
        SUN  9,999 of 10,000  /data/SUN  (the count differs)
    """
    counts = [f"{row.images:,}" + (f" of {row.expected:,}" if row.expected else "") for row in found]
    wide, wider = max(len(row.name) for row in found), max(map(len, counts))
    return "\n".join(
        f"{row.name:{wide}}  {count:>{wider}}  {row.error or row.path}"
        + ("  (the count differs)" if _differs(row) else "")
        for row, count in zip(found, counts, strict=True)
    )


def find_protocol(
    name: str,
    root: PathLike,
    *,
    overrides: Mapping[str, PathLike] | None = None,
    class_names_file: PathLike | None = None,
) -> Protocol:
    """Find a protocol's images and class names.

    Labels are the ranks of the wnids, in sorted order, or the positions in the protocol's list of classes. Counts
    that differ from the paper's go into the notes.

    Args:
        name: of `list_protocols`.
        root: the folder with all data.
        overrides: see `inspect_protocol`.
        class_names_file: lines of wnid, space, name, or of names in the order of the labels. By default the one
            beside the images, else CLIP's names, or those of the class folders.

    Raises:
        UsageError: an unknown protocol, or an override of a set that it does not have.
        MissingDataError: a set or file that is not there; training images may be missing, but not where an
            override says they are.
        DataError: class folders of other names, classes of the class list without a folder, or a class without
            a name.

    Example:
        >>> protocol = find_protocol("imagenet-500-hard", "/data")  # doctest: +SKIP
        >>> len(protocol.class_names), list(protocol.ood)  # doctest: +SKIP
        (500, ['iNaturalist', 'SUN', 'Places', 'Texture'])
    """
    found, classes = _inspect(name, root, overrides)
    if errors := [row.error for row in found if row.error and not _may_be_missing(row)]:
        raise type(errors[0])(" ".join(map(str, errors)))
    protocol = _data()["protocols"][name]
    spec = _set(protocol["id"])
    names = _class_names(classes, spec, Path(root).expanduser(), class_names_file)
    sources = {row.name: row.source for row in found if row.source}
    return Protocol(
        name=name,
        title=protocol["id"],
        class_names=names,
        wnids=classes if spec["wnid_folders"] else [],
        train=_named(sources["train"], names) if "train" in sources else None,
        test=_named(sources["test"], names),
        ood={other: sources[other] for other in protocol["ood"]},
        found=found,
        notes=[*protocol.get("notes", []), *_differences(found, names, spec["class_count"])],
    )


def _may_be_missing(row: FoundSet) -> bool:
    """Zero-shot methods need no training images; those of an override must be there."""
    return row.name == "train" and row.path is None


def _named(source: ImageSource, names: list[str]) -> ImageSource:
    part = source.subset(slice(None))
    part.label_names = part.label_values = list(names)
    return part


def _differences(found: list[FoundSet], names: list[str], class_count: int) -> list[str]:
    notes = [f"{row.name}: {row.images:,} images, not {row.expected:,}." for row in found if _differs(row)]
    notes += [str(row.error) for row in found if row.error]
    if len(names) != class_count:
        notes.append(f"{len(names)} classes, not {class_count}.")
    if doubled := sorted(name for name, count in Counter(names).items() if count > 1):
        notes.append(f"Classes with the same name have the same text features: {', '.join(map(repr, doubled))}.")
    return notes


def _differs(row: FoundSet) -> bool:
    return row.error is None and row.expected not in (None, row.images)


# ---- the data files


@cache
def _data() -> dict[str, dict[str, Any]]:
    """All "sets" and all "protocols"."""
    folder = files("ood_core") / "protocols_data"
    merged: dict[str, dict[str, Any]] = {"sets": {}, "protocols": {}}
    for file in sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name):
        content = json.loads(file.read_text(encoding="utf-8"))
        for kind, entries in merged.items():
            entries |= content[kind]
    return merged


def _set(name: str) -> dict[str, Any]:
    """A set's entry; a subset has its own folders before those of the whole, and the rest where it says nothing."""
    spec = _data()["sets"][name]
    if "subset_of" not in spec:
        return spec
    whole, own = _data()["sets"][spec["subset_of"]], spec.get("folders", {})
    return whole | spec | {"folders": {split: own.get(split, []) + rest for split, rest in whole["folders"].items()}}


# ---- looking


def _inspect(name: str, root: PathLike, overrides: Mapping[str, PathLike] | None) -> tuple[list[FoundSet], list[str]]:
    """Every set, and the folders of the ID classes."""
    if name not in (known := _data()["protocols"]):
        raise unknown_name("protocol", name, known)
    root, given = Path(root).expanduser(), dict(overrides or {})
    if not root.is_dir():
        raise MissingDataError(f"There is no folder {str(root)!r}; give the folder that holds the data sets.")
    protocol = known[name]
    id_set, class_list = _set(protocol["id"]), given.pop("class_list", None)
    if class_list is not None and "class_list" not in id_set:
        raise UsageError(f"Protocol {name!r} has no list of classes to replace by class_list={str(class_list)!r}.")
    names = ["train", "test", *protocol["ood"]]
    for other in set(given) - set(names):
        raise unknown_name(f"image set of protocol {name!r}", other, names)
    rows = [_find(split, split, id_set, root, given.get(split)) for split in ("train", "test")]
    classes = _classes(id_set, root, rows, class_list)
    rows = [_restrict(row, classes, id_set) for row in rows]
    for other, split in protocol["ood"].items():
        spec = _set(other)
        row = _find(other, split, spec, root, given.get(other))
        rows.append(_restrict(row, _classes(spec, root, [row]), spec) if _class_test(spec) else row)
    return rows, classes


def _find(name: str, split: str, spec: Mapping[str, Any], root: Path, override: PathLike | None) -> FoundSet:
    """The set with all classes of its folder."""
    expected, is_class = spec["images"].get(split), _class_test(spec)
    places = [root / folder for folder in spec["folders"][split]]
    path = next(filter(_usable(is_class), places), None) if override is None else Path(override).expanduser()
    if path is None:
        error = MissingDataError(
            f"{name}: none of {', '.join(map(str, places))} is a folder"
            f"{f' with one folder per class, named {_naming(spec)}' if is_class else ''}; "
            f"give another place as an override of {name!r}, or get it: {spec['published']}."
        )
        return FoundSet(name, None, 0, expected, error)
    try:
        source = open_source(path)
        if is_class:
            _check_labels(source, path, spec)
    except (MissingDataError, DataError) as error:
        return FoundSet(name, path, 0, expected, type(error)(f"{name}: {error}"))
    return FoundSet(name, path, len(source), expected, None, source)


ClassTest = Callable[[str], object]


def _class_test(spec: Mapping[str, Any]) -> ClassTest | None:
    """Whether a folder's name is that of a class; None for a set without classes."""
    if spec.get("wnid_folders"):
        return _WNID.fullmatch
    return frozenset(spec["classes"]).__contains__ if "classes" in spec else None


def _naming(spec: Mapping[str, Any]) -> str:
    return "by wnid as n01440764" if spec["wnid_folders"] else f"as one of {', '.join(spec['classes'])}"


def _usable(is_class: ClassTest | None) -> Callable[[Path], bool]:
    """Whether a place is a folder, with a class folder in it if the set has such."""
    if is_class is None:
        return Path.is_dir
    return lambda place: place.is_dir() and any(is_class(entry.name) and entry.is_dir() for entry in place.iterdir())


def _check_labels(source: ImageSource, path: Path, spec: Mapping[str, Any]) -> None:
    """Every label must be a class; a wnid's rank would shift behind a folder of another name."""
    is_class = _class_test(spec) or bool
    named = np.array([bool(is_class(name)) for name in source.label_names] + [False])
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    if (outside := np.flatnonzero(~named[labels])).size:
        first = source.ids[outside[0]]
        raise DataError(
            f"{str(path)!r} holds {len(outside)} images outside class folders named {_naming(spec)}; "
            f"first {first!r}. Move them away."
        )


def _classes(spec: Mapping[str, Any], root: Path, rows: list[FoundSet], given: PathLike | None = None) -> list[str]:
    """The classes of a set by label: those it names; or, sorted, its class list, all wnids found, or half of them."""
    if not spec["wnid_folders"]:
        return list(spec["classes"])
    if "classes" in spec:
        here = (root / place for place in spec["class_list"])
        path = given or next((place for place in here if place.is_file()), None)
        return sorted(spec["classes"]) if path is None else _read_class_list(Path(path).expanduser(), spec)
    present = sorted({name for row in rows if row.source for name in row.source.label_names})
    middle = (len(present) + 1) // 2
    return {"first": present[:middle], "last": present[middle:]}.get(spec.get("half", ""), present)


def _read_class_list(path: Path, spec: Mapping[str, Any]) -> list[str]:
    lines = read_class_names(path)
    if wrong := [line for line in lines if not _WNID.fullmatch(line)]:
        published = spec["class_list_published"]
        raise DataError(f"{str(path)!r} is no class list: {wrong[0]!r} is no wnid. See {published}.")
    return sorted(set(lines))


def _restrict(row: FoundSet, classes: list[str], spec: Mapping[str, Any]) -> FoundSet:
    """The images of these classes, labelled by position."""
    if row.source is None:
        return row
    source = row.source.with_labels_from(classes)
    source = source.subset(np.flatnonzero(np.asarray(source.labels) >= 0))
    absent = sorted(set(classes) - set(row.source.label_names))
    if len(source) and not (absent and "classes" in spec):
        return replace(row, images=len(source), source=source)
    error = DataError(
        f"{row.name}: {str(row.path)!r} lacks {len(absent)} of the {len(classes)} classes "
        f"({', '.join([*absent[:3], *(['...'] if absent[3:] else [])])})"
        + (f"; their list is {spec['class_list_published']}." if "class_list" in spec else ".")
    )
    return replace(row, images=0, error=error, source=None)


# ---- class names


def _class_names(classes: list[str], spec: Mapping[str, Any], root: Path, given: PathLike | None) -> list[str]:
    """From a file, else the benchmark's own names, else CLIP's."""
    here = (root / place for place in spec["class_names"])
    path = given or next((place for place in here if place.is_file()), None)
    path = None if path is None else Path(path).expanduser()
    if not spec["wnid_folders"]:
        return [name.replace("_", " ") for name in (_names_in_order(path, classes) if path else classes)]
    own = spec["classes"] if isinstance(spec.get("classes"), dict) else {}
    names = _clip_names() | own if path is None else _read_names(path, classes)
    if absent := [wnid for wnid in classes if wnid not in names]:
        raise DataError(
            f"{len(absent)} of the {len(classes)} classes, first {absent[0]!r}, have no name "
            f"{'among the 1,000 of ImageNet' if path is None else f'in {str(path)!r}'}; "
            "give a class_names_file with a line for each: wnid, space, name."
        )
    return [names[wnid].replace("_", " ") for wnid in classes]


def _names_in_order(path: Path, classes: list[str]) -> list[str]:
    lines = read_class_names(path)
    if len(lines) != len(classes):
        raise DataError(
            f"{str(path)!r} has {len(lines)} names for {len(classes)} classes; "
            f"give one per line, from that of {classes[0]!r} to that of {classes[-1]!r}."
        )
    return lines


@cache
def _clip_names() -> dict[str, str]:
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
    for order in (wnids, list(_clip_names())):
        if len(order) == len(lines):
            return dict(zip(order, lines, strict=True))
    raise DataError(
        f"{str(path)!r} has {len(lines)} names without wnids for {len(wnids)} classes; put wnids before them."
    )
