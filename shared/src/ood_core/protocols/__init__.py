"""Benchmarks of the papers, found as they lie on a user's disk.

What is looked for stands in `protocols_data/*.json`. "protocols" name an ID set and, by OOD set, the split taken.
They may have: a `title` other than the ID set's name; `kinds` ("near" or "far") by OOD set; the `convention` of their
FPR; `notes`; `sets`, where an OOD set has another entry than its name says; `shifted`, further sets whose images of
the ID classes join the test images; `shots`, how many training images per class are learned from, the others setting
thresholds; `leave_out`, how many ID classes are unknown at a time, a task for each choice.

"sets" have: `places` by split ("train", "calibration", "test"), of which the first that is there counts: a folder, a
table, `FILE.parquet:split`, or a list of images, which lie at one of the `image_places`; `images` expected by split;
where they are `published`. A set with one folder per class also has `class_count` and files of `class_names`. Where
`wnid_folders` is true these folders are named by WordNet id, and a set of some classes only has: `subset_of` another
set, whose places are looked up after its own, with either `half` of the classes, or all but those of another set
(`others_of`), or a list of `classes` (with or without names) that a file `class_list` replaces. Elsewhere `classes`
are the names of the folders, in the order of the labels, with or without names for prompts; without them every label
is a class.

Packages add protocols with an entry point in the group `ood.protocols`: `name = "package.module:CONTRIBUTION"`, a
`ContributedProtocol`.
"""

from __future__ import annotations

__all__ = [
    "ContributedProtocol",
    "FoundSet",
    "Protocol",
    "check_found",
    "data_root",
    "describe",
    "find_protocol",
    "find_tasks",
    "inspect_protocol",
    "list_protocols",
    "summarise_protocol",
]

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ood_core.data.fewshot import FewShot
from ood_core.data.joined import JoinedSources
from ood_core.data.sources import ImageSource, PathLike
from ood_core.errors import UsageError, unknown_name
from ood_core.protocols.catalog import catalog, set_entry, tasks_of
from ood_core.protocols.names import class_names as names_of_classes
from ood_core.protocols.sets import FoundSet, check_found, data_root, look
from ood_core.registry import PROTOCOLS


@dataclass(frozen=True)
class Protocol:
    """A benchmark on this disk.

    Attributes:
        name: as in `list_protocols`.
        title: the ID set, or the benchmark, as the papers call it.
        class_names: C names, in the order of the labels 0..C-1.
        wnids: C WordNet ids, in the same order; none where the class folders have names.
        train: ID training images, or None; its `label_names` are the class names, as are those of `test`.
        test: ID test images.
        ood: OOD images by name, in the paper's order.
        found: the same sets with paths and counts.
        notes: what differs from the paper's benchmark.
        calibration: held-out ID images that set thresholds, or None.
        kinds: "near" or "far" by OOD set, where the benchmark says so.
        convention: of its FPR, see `metrics.fpr_at_tpr`.
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
    calibration: ImageSource | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    convention: str = "standard"

    def describe(self) -> str:
        """What was found where, for people."""
        head = f"{self.name}: {len(self.class_names)} classes, {self.class_names[0]!r} to {self.class_names[-1]!r}"
        return "\n".join([head, describe(self.found), *(f"Note: {note}" for note in self.notes)])

    def by_wnid(self) -> Protocol:
        """The same with WordNet ids for class names; itself where the class folders have names."""
        if not self.wnids:
            return self
        train, held = (None if s is None else s.relabelled(self.wnids) for s in (self.train, self.calibration))
        test = self.test.relabelled(self.wnids)
        return replace(self, class_names=list(self.wnids), train=train, calibration=held, test=test)


@dataclass(frozen=True)
class ContributedProtocol:
    """A protocol that a package adds.

    Attributes:
        title: the ID set as the papers call it.
        kinds: "near", "far" or "" by OOD set.
        inspect: the sets below a folder, found or not.
        find: the tasks below a folder, each a `Protocol` whose name starts with that of the entry point.

    Example:
        >>> mine = ContributedProtocol("Mine", {"others": "near"}, inspect=lambda root: [], find=lambda root: [])
        >>> list(mine.kinds)
        ['others']
    """

    title: str
    kinds: Mapping[str, str]
    inspect: Callable[[Path], list[FoundSet]]
    find: Callable[[Path], list[Protocol]]


def list_protocols() -> list[str]:
    """The known protocols, those of other packages last.

    Example:
        >>> list_protocols()[:2]
        ['imagenet-1k', 'imagenet-500-easy']
    """
    own = [name for name, entry in catalog()["protocols"].items() if "task_of" not in entry]
    return own + sorted(set(PROTOCOLS.names()) - set(own))


def summarise_protocol(name: str) -> dict[str, Any]:
    """What a protocol is, without any data.

    Args:
        name: of `list_protocols`, or a task.

    Returns:
        "name", "title" (the ID set), "sets" (OOD set -> "near", "far" or ""), and where there are any "tasks",
        "convention" and "notes"; or "name" and "error", where the package that adds it cannot be imported.

    Raises:
        UsageError: an unknown protocol.

    Example:
        >>> summarise_protocol("imagenet-10")["sets"]
        {'ImageNet-20': 'near'}
    """
    if family := _family(name):
        try:
            added = _load(family)
        except UsageError as error:
            return {"name": name, "error": str(error)}
        return {"name": name, "title": added.title, "sets": dict(added.kinds)}
    entry = catalog()["protocols"][name]
    tasks = tasks_of(name)
    task = catalog()["protocols"][tasks[0]]
    sets = {other: task.get("kinds", {}).get(other, "") for other in task["ood"]}
    about = {"name": name, "title": _title(entry), "sets": sets} | ({"tasks": tasks} if tasks != [name] else {})
    return about | {key: entry[key] for key in ("convention", "notes") if key in entry}


def _title(entry: Mapping[str, Any]) -> str:
    return entry.get("title") or entry["id"]


def inspect_protocol(name: str, root: PathLike, overrides: Mapping[str, PathLike] | None = None) -> list[FoundSet]:
    """Look for the sets of a protocol without asking that they be there: the dry run of `find_protocol`.

    Args:
        name: of `list_protocols`, or a task.
        root: the folder with all data.
        overrides: other places, by "train", "calibration", "test", OOD set or "class_list" (a file of wnids, one per
            line). An image set may be a folder, an image list (.txt) or whatever else `open_source` takes; an ID set
            has wnids, or the names of the protocol's class folders, as labels.

    Returns:
        "train", "calibration" if the protocol has it, "test" and the OOD sets in the paper's order.

    Raises:
        UsageError: an unknown protocol, or an override of a set that it does not have.
        MissingDataError: no such root.

    Example:
        >>> print(describe(inspect_protocol("imagenet-1k", "/data")))  # doctest: +SKIP
        train  1,281,167 of 1,281,167  /data/imagenet/train
    """
    if family := _family(name):
        _refuse_options(name, overrides)
        return _load(family).inspect(Path(root).expanduser())
    return look(name, root, overrides)[0]


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
        + ("  (the count differs)" if row.differs else "")
        for row, count in zip(found, counts, strict=True)
    )


def find_protocol(
    name: str,
    root: PathLike,
    *,
    overrides: Mapping[str, PathLike] | None = None,
    class_names_file: PathLike | None = None,
    seed: int = 0,
) -> Protocol:
    """Find a protocol's images and class names.

    Labels are the ranks of the wnids, in sorted order, or the positions in the protocol's list of classes. Counts
    that differ from the paper's go into the notes.

    Args:
        name: of `list_protocols`, or a task.
        root: the folder with all data.
        overrides: see `inspect_protocol`.
        class_names_file: lines of wnid, space, name, or of names in the order of the labels. By default the one
            beside the images, else CLIP's names, or those of the class folders.
        seed: of the few-shot draw, where the protocol has one.

    Raises:
        UsageError: an unknown protocol, one of several tasks, or an override of a set that it does not have.
        MissingDataError: a set or file that is not there; training and calibration images may be missing, but not
            where an override says they are.
        DataError: class folders of other names, classes of the class list without a folder, or a class without
            a name.

    Example:
        >>> protocol = find_protocol("imagenet-500-hard", "/data")  # doctest: +SKIP
        >>> len(protocol.class_names), list(protocol.ood)  # doctest: +SKIP
        (500, ['iNaturalist', 'SUN', 'Places', 'Texture'])
    """
    options: dict[str, Any] = {"overrides": overrides, "class_names_file": class_names_file, "seed": seed}
    tasks = tasks_of(name)
    if len(tasks) == 1:
        found = find_tasks(name, root, **options)
        tasks = [task.name for task in found]
        if len(found) == 1:
            return found[0]
    raise UsageError(f"Protocol {name!r} has {len(tasks)} tasks; find one of them: {', '.join(tasks)}.")


def find_tasks(
    name: str,
    root: PathLike,
    *,
    overrides: Mapping[str, PathLike] | None = None,
    class_names_file: PathLike | None = None,
    seed: int = 0,
) -> list[Protocol]:
    """Find every task of a protocol; one that has none is a task itself.

    Args:
        name: of `list_protocols`, or a task.
        root: the folder with all data.
        overrides: see `inspect_protocol`.
        class_names_file: see `find_protocol`.
        seed: see `find_protocol`.

    Raises:
        UsageError: as `find_protocol`.
        MissingDataError: as `find_protocol`.
        DataError: as `find_protocol`.

    Example:
        >>> [task.name for task in find_tasks("histology-5", "/packs")][:2]  # doctest: +SKIP
        ['histology-5-AC+H', 'histology-5-AC+S']
    """
    if family := _family(name):
        _refuse_options(name, overrides, class_names_file)
        found = _load(family).find(Path(root).expanduser())
        chosen = [task for task in found if name in (family, task.name)]
        if not chosen:
            raise unknown_name(f"task of protocol {family!r}", name, [task.name for task in found])
        return chosen
    return [_find(task, root, overrides, class_names_file, seed) for task in tasks_of(name)]


def _find(
    name: str, root: PathLike, overrides: Mapping[str, PathLike] | None, class_names_file: PathLike | None, seed: int
) -> Protocol:
    found, classes = look(name, root, overrides)
    check_found(found)
    entry = catalog()["protocols"][name]
    spec, rows = set_entry(entry["id"]), {row.name: row for row in found}
    places = [rows[split].path for split in ("test", "train")]
    names = names_of_classes(classes, spec, Path(root).expanduser(), class_names_file, places)
    sources = {row.name: row.source for row in found if row.source}
    if "shifted" in entry:
        tested = JoinedSources({other: sources[other] for other in ("test", *entry["shifted"])})
        sources["test"] = tested.with_labels_from(classes)
    own = {split: sources[split].relabelled(names) for split in ("train", "calibration", "test") if split in sources}
    train, calibration = _few(own.get("train"), own.get("calibration"), entry.get("shots"), seed)
    return Protocol(
        name=name,
        title=_title(entry),
        class_names=names,
        wnids=classes if spec["wnid_folders"] else [],
        train=train,
        test=own["test"],
        ood={other: sources[other] for other in entry["ood"]},
        found=found,
        notes=[*entry.get("notes", []), *_differences(found, names, spec.get("class_count"))],
        calibration=calibration,
        kinds=entry.get("kinds", {}),
        convention=entry.get("convention", "standard"),
    )


def _few(
    train: ImageSource | None, calibration: ImageSource | None, shots: int | None, seed: int
) -> tuple[ImageSource | None, ImageSource | None]:
    """The images drawn to learn from; the others set the thresholds if nothing else does."""
    if train is None or shots is None:
        return train, calibration
    few = FewShot(train, shots, seed)
    drawn = set(few.ids)
    rest = [index for index, id in enumerate(train.ids) if id not in drawn]
    return few, train.subset(rest) if calibration is None and rest else calibration


def _differences(found: list[FoundSet], names: list[str], class_count: int | None) -> list[str]:
    notes = [f"{row.name}: {row.images:,} images, not {row.expected:,}." for row in found if row.differs]
    notes += [str(row.error) for row in found if row.error]
    if class_count not in (None, len(names)):
        notes.append(f"{len(names)} classes, not {class_count}.")
    if doubled := sorted(name for name, count in Counter(names).items() if count > 1):
        notes.append(f"Classes with the same name have the same text features: {', '.join(map(repr, doubled))}.")
    return notes


# ---- protocols of other packages


def _family(name: str) -> str | None:
    """The added protocol of this name, or of which this may be a task; None for one of the data files."""
    if name in catalog()["protocols"]:
        return None
    families = [known for known in PROTOCOLS.entries if f"{name}-".startswith(f"{known}-")]
    if not families:
        raise unknown_name("protocol", name, list_protocols())
    return max(families, key=len)


def _load(family: str) -> ContributedProtocol:
    added: ContributedProtocol = PROTOCOLS.load(family)
    return added


def _refuse_options(
    name: str, overrides: Mapping[str, PathLike] | None, class_names_file: PathLike | None = None
) -> None:
    given = [*(overrides or {}), *([] if class_names_file is None else [f"class names in {str(class_names_file)!r}"])]
    if given:
        raise UsageError(f"Protocol {name!r} takes no other places or class names, but got {', '.join(given)}.")
