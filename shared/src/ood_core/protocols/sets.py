"""Image sets as they lie on a disk: found or not, with their classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ood_core.data.lists import ImageList
from ood_core.data.sources import ImageSource, ParquetImages, PathLike, open_source
from ood_core.errors import DataError, MissingDataError, UsageError, unknown_name
from ood_core.prompts import read_class_names
from ood_core.protocols.catalog import catalog, set_entry
from ood_core.protocols.names import WNID, clip_names

_FILES = re.compile(r".+\.(txt|csv|tsv|jsonl|parquet(:\w+)?)", re.IGNORECASE)


@dataclass(frozen=True)
class FoundSet:
    """One image set of a protocol, found or not.

    Attributes:
        name: "train", "calibration", "test" or the name of an OOD set.
        path: where it was found.
        images: how many were found.
        expected: how many the paper's set has; None where that is not known.
        error: why it cannot be used.
        content: what was read there: the images, or a table.
        optional: it need not be there; but what is there must be usable.
    """

    name: str
    path: Path | None
    images: int
    expected: int | None
    error: MissingDataError | DataError | None = None
    content: Any = field(default=None, repr=False)
    optional: bool = False

    @classmethod
    def read(
        cls, name: str, path: Path, expected: int | None, read: Callable[[Path], Any], *, optional: bool = False
    ) -> FoundSet:
        """What a function makes of a path, with its length as the count; or why it cannot."""
        try:
            content = read(path)
        except (MissingDataError, DataError) as error:
            there = path if path.exists() else None
            return cls(name, there, 0, expected, type(error)(f"{name}: {error}"), optional=optional)
        return cls(name, path, len(content), expected, None, content, optional)

    @property
    def source(self) -> ImageSource | None:
        """The images, where it is images that were looked for."""
        return self.content if isinstance(self.content, ImageSource) else None

    @property
    def differs(self) -> bool:
        """Whether it was found with another number of images than expected."""
        return self.error is None and self.expected not in (None, self.images)

    @property
    def dispensable(self) -> bool:
        """Optional, and not there."""
        return self.optional and self.path is None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: "set", "path", "images", "expected", "error"."""
        path, error = (None if value is None else str(value) for value in (self.path, self.error))
        return {"set": self.name, "path": path, "images": self.images, "expected": self.expected, "error": error}


def check_found(found: Iterable[FoundSet]) -> None:
    """Raise the errors of everything that is not there and not optional, or is there and cannot be used.

    Raises:
        MissingDataError, DataError: the kind of the first; the message has all of them.
    """
    if errors := [row.error for row in found if row.error and not row.dispensable]:
        raise type(errors[0])(" ".join(map(str, errors)))


def data_root(root: PathLike) -> Path:
    """The folder with all data.

    Raises:
        MissingDataError: no such folder.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise MissingDataError(f"There is no folder {str(path)!r}; give the folder that holds the data sets.")
    return path


def look(name: str, root: PathLike, overrides: Mapping[str, PathLike] | None) -> tuple[list[FoundSet], list[str]]:
    """Every set of a protocol, and the folders of the ID classes."""
    root, given = data_root(root), dict(overrides or {})
    protocol = catalog()["protocols"][name]
    id_set, class_list = set_entry(protocol["id"]), given.pop("class_list", None)
    if class_list is not None and "class_list" not in id_set:
        raise UsageError(f"Protocol {name!r} has no list of classes to replace by class_list={str(class_list)!r}.")
    own = [split for split in ("train", "calibration", "test") if split in id_set["places"]]
    shifted, ood = protocol.get("shifted", {}), protocol["ood"]
    names = [*own, *shifted, *ood]
    for other in set(given) - set(names):
        raise unknown_name(f"image set of protocol {name!r}", other, names)
    rows = [_find(split, split, id_set, root, given.get(split)) for split in own]
    classes = _classes(id_set, root, rows, class_list)
    rows = [_restrict(row, classes, id_set) for row in rows]
    for other, split in (shifted | ood).items():
        spec = set_entry(protocol.get("sets", {}).get(other, other))
        row = _find(other, split, spec, root, given.get(other))
        if other in shifted:
            row = _restrict(row, classes, spec)
        elif class_test(spec):
            row = _restrict(row, _classes(spec, root, [row], class_list if "others_of" in spec else None), spec)
        rows.append(row)
    return rows, classes


def _find(name: str, split: str, spec: Mapping[str, Any], root: Path, override: PathLike | None) -> FoundSet:
    """The set with all classes of its place."""
    expected, is_class = spec["images"].get(split), class_test(spec)
    places = [root / place for place in spec["places"][split]]
    path = next(filter(_usable(is_class), places), None) if override is None else Path(override).expanduser()
    if path is None:
        error = MissingDataError(
            f"{name}: none of {', '.join(map(str, places))} is {_kind(places, spec)}; "
            f"give another place as an override of {name!r}, or get it: {spec['published']}."
        )
        # Zero-shot methods need no training images, and scores no threshold; those of an override must be there.
        return FoundSet(name, None, 0, expected, error, optional=name in ("train", "calibration"))
    try:
        source = _open(path, root, spec)
        if is_class and not isinstance(source, ParquetImages):
            _check_labels(source, path, spec)
    except (MissingDataError, DataError, UsageError) as error:
        kind = MissingDataError if isinstance(error, MissingDataError) else DataError
        return FoundSet(name, path, 0, expected, kind(f"{name}: {error}"))
    return FoundSet(name, path, len(source), expected, None, source)


def _kind(places: list[Path], spec: Mapping[str, Any]) -> str:
    if all(map(_is_file, places)):
        return "a file"
    return f"a folder with one folder per class, named {_naming(spec)}" if class_test(spec) else "a folder"


def _open(path: Path, root: Path, spec: Mapping[str, Any]) -> ImageSource:
    """The images, labelled by class folder; a pack's own names of its labels are for prompts."""
    if path.suffix == ".txt":
        wnids = list(clip_names()) if spec.get("wnid_folders") else None
        return ImageList(path, root, places=spec.get("image_places", ["{path}"]), label_names=wnids)
    source = open_source(path)
    if isinstance(source, ParquetImages):
        source.label_names = [str(value) for value in source.label_values]
    return source


ClassTest = Callable[[str], object]


def class_test(spec: Mapping[str, Any]) -> ClassTest | None:
    """Whether a folder's name is that of a class; None for a set without classes of its own."""
    if spec.get("wnid_folders"):
        return WNID.fullmatch
    return frozenset(spec["classes"]).__contains__ if "classes" in spec else None


def _naming(spec: Mapping[str, Any]) -> str:
    return "by wnid as n01440764" if spec["wnid_folders"] else f"as one of {', '.join(spec['classes'])}"


def _is_file(place: Path) -> bool:
    return bool(_FILES.fullmatch(place.name))


def _usable(is_class: ClassTest | None) -> Callable[[Path], bool]:
    """Whether a place is a file, or a folder, with a class folder in it if the set has such."""

    def usable(place: Path) -> bool:
        if _is_file(place):
            return place.with_name(place.name.partition(":")[0]).is_file()
        if is_class is None or not place.is_dir():
            return place.is_dir()
        return any(is_class(entry.name) and entry.is_dir() for entry in place.iterdir())

    return usable


def _check_labels(source: ImageSource, path: Path, spec: Mapping[str, Any]) -> None:
    """Every label must be a class; a wnid's rank would shift behind a folder of another name."""
    is_class = class_test(spec) or bool
    named = np.array([bool(is_class(name)) for name in source.label_names] + [False])
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    if (outside := np.flatnonzero(~named[labels])).size:
        first = source.ids[outside[0]]
        raise DataError(
            f"{str(path)!r} holds {len(outside)} images outside class folders named {_naming(spec)}; "
            f"first {first!r}. Move them away."
        )


def _classes(spec: Mapping[str, Any], root: Path, rows: list[FoundSet], given: PathLike | None = None) -> list[str]:
    """The classes of a set by label: those it names; or, sorted, its class list, all found, or half of them."""
    if "classes" in spec and not spec["wnid_folders"]:
        return list(spec["classes"])
    if "others_of" in spec:
        known = _classes(set_entry(spec["others_of"]), root, rows, given)
        return sorted(set(clip_names()) - set(known))
    if "classes" in spec:
        here = (root / place for place in spec["class_list"])
        path = given or next((place for place in here if place.is_file()), None)
        return sorted(spec["classes"]) if path is None else _read_class_list(Path(path).expanduser(), spec)
    present = sorted({name for row in rows if row.source for name in row.source.label_names})
    middle = (len(present) + 1) // 2
    return {"first": present[:middle], "last": present[middle:]}.get(spec.get("half", ""), present)


def _read_class_list(path: Path, spec: Mapping[str, Any]) -> list[str]:
    """Wnids, or their ranks among the 1,000 of ImageNet."""
    lines, ranked = read_class_names(path), dict(enumerate(clip_names()))
    lines = [ranked.get(int(line), line) if line.isdecimal() else line for line in lines]
    if wrong := [line for line in lines if not WNID.fullmatch(line)]:
        published = spec["class_list_published"]
        raise DataError(f"{str(path)!r} is no class list: {wrong[0]!r} is no wnid. See {published}.")
    return sorted(set(lines))


def _restrict(row: FoundSet, classes: list[str], spec: Mapping[str, Any]) -> FoundSet:
    """The images of these classes, labelled by position."""
    if row.source is None:
        return row
    if row.source.labels is None:
        error = DataError(f"{row.name}: the images in {str(row.path)!r} have no labels; add a column `label`.")
        return replace(row, images=0, error=error, content=None)
    source = row.source.with_labels_from(classes)
    source = source.subset(np.flatnonzero(np.asarray(source.labels) >= 0))
    absent = sorted(set(classes) - set(row.source.label_names))
    if len(source) and not (absent and "classes" in spec):
        return replace(row, images=len(source), content=source)
    error = DataError(
        f"{row.name}: {str(row.path)!r} lacks {len(absent)} of the {len(classes)} classes "
        f"({', '.join([*absent[:3], *(['...'] if absent[3:] else [])])})"
        + (f"; their list is {spec['class_list_published']}." if "class_list" in spec else ".")
    )
    return replace(row, images=0, error=error, content=None)
