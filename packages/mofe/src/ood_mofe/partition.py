"""Which group each class belongs to: from WordNet, from the user, from feature space."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from ood_core import check
from ood_core.errors import DataError, MissingDataError, UsageError
from ood_core.prompts import imagenet_names
from torch import Tensor

from ood_mofe.functional import cluster_classes, partition_classes, wordnet_groups

__all__ = ["GROUPINGS", "assign_groups", "imagenet_edges", "imagenet_words", "initial_groups", "read_groups"]

GROUPINGS = ("auto", "both", "wordnet", "clustering", "given")


def assign_groups(
    class_names: Sequence[str],
    prototypes: Tensor,
    n: int,
    *,
    grouping: str = "auto",
    groups: Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
) -> Tensor:
    """Divide classes among n groups.

    Args:
        class_names: C names; for WordNet's groups ids such as "n02084071".
        prototypes: class means in feature space [C, D].
        n: number of groups, 1 to C.
        grouping: "wordnet" (groups close in meaning), "clustering" (K-Means alone), "both" (K-Means from WordNet's
            groups, or from `groups`), "given" (`groups` as they are), or "auto": "given" if there are `groups`, else
            "both" for classes of ImageNet and "clustering" for others.
        groups: class name -> its group (any text or number), or a CSV file of such pairs.
        seed: of "clustering".

    Returns:
        int64 [C], none of the n groups empty.

    Raises:
        UsageError: more groups than classes, no `groups` for "given", another number of them than n, or `groups` that
            would not be used.
        DataError: `groups` with unknown or missing classes, or classes that are not in WordNet.
        MissingDataError: no such file.
    """
    initial, refine = initial_groups(class_names, n, grouping=grouping, groups=groups)
    if initial is None:
        return cluster_classes(prototypes, n, seed)
    return partition_classes(prototypes, initial) if refine else initial


def initial_groups(
    class_names: Sequence[str],
    n: int,
    *,
    grouping: str = "auto",
    groups: Mapping[str, Any] | str | Path | None = None,
) -> tuple[Tensor | None, bool]:
    """What is known of the groups without features.

    Args and raises: as `assign_groups`.

    Returns:
        The groups [C], None for clusters alone; and whether features refine them.
    """
    check.choice("grouping", grouping, GROUPINGS)
    if n > len(class_names):
        raise UsageError(f"{n} experts are more than the {len(class_names)} classes: pass experts={len(class_names)}.")
    if groups is not None:
        if grouping in ("wordnet", "clustering"):
            raise UsageError(f"groups= are not used by grouping={grouping!r}: pass grouping='given' or 'both'.")
        return _given(class_names, groups, n), grouping == "both"
    if grouping == "given":
        raise UsageError("grouping='given' needs groups=: a mapping of class names to groups, or a CSV file of them.")
    if grouping == "clustering":
        return None, False
    edges = imagenet_edges()
    if grouping == "auto" and not {child for _, child in edges} >= set(class_names):
        return None, False
    return _from_wordnet(class_names, edges, n), grouping != "wordnet"


def imagenet_edges() -> list[tuple[str, str]]:
    """The (parent, child) pairs of WordNet 3.0 above ImageNet's 1,000 classes (licence in `wordnet/LICENSE`)."""
    source = resources.files("ood_mofe") / "wordnet" / "imagenet-is-a.csv.gz"
    with source.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8", newline="") as table:
        return [(parent, child) for parent, child in list(csv.reader(table))[1:]]


def imagenet_words(class_names: Sequence[str]) -> list[str]:
    """Class names for prompts: CLIP's names in place of ImageNet's ids, other names as they are.

    Example:
        >>> imagenet_words(["n01440764", "ant"])
        ['tench', 'ant']
    """
    edges = imagenet_edges()
    leaves = sorted({child for _, child in edges} - {parent for parent, _ in edges})
    words = dict(zip(leaves, imagenet_names(), strict=True))
    return [words.get(name, name) for name in class_names]


def read_groups(file: str | Path) -> dict[str, str]:
    """Class name -> group, from a CSV file with these two columns; a first line "...,group" is a heading.

    Raises:
        MissingDataError: no such file.
        DataError: a row without two columns, or a class named twice.
    """
    if not Path(file).is_file():
        raise MissingDataError(f"There is no file {str(file)!r} with groups of classes; check the path.")
    with Path(file).open(encoding="utf-8", newline="") as table:
        rows = [row for row in csv.reader(table) if row]
    if rows and rows[0][-1].strip().lower() == "group":
        rows = rows[1:]
    found: dict[str, str] = {}
    for row in rows:
        if len(row) != 2 or row[0] in found:
            raise DataError(f"{str(file)!r} must have one row 'class,group' per class; got {','.join(row)!r}.")
        found[row[0]] = row[1].strip()
    return found


def _given(class_names: Sequence[str], groups: Mapping[str, Any] | str | Path, n: int) -> Tensor:
    table = {_plain(name): str(group) for name, group in _as_mapping(groups).items()}
    wanted = {_plain(name): name for name in class_names}
    if unknown := [name for name in table if name not in wanted]:
        raise DataError(f"groups names {len(unknown)} unknown classes, first {unknown[0]!r}: leave them out.")
    if missing := [name for plain, name in wanted.items() if plain not in table]:
        raise DataError(f"groups leaves out {len(missing)} classes, first {missing[0]!r}: give them a group.")
    names = sorted(set(table.values()))
    if len(names) != n:
        raise UsageError(f"groups holds {len(names)} groups for {n} experts: pass experts={len(names)}.")
    return torch.tensor([names.index(table[_plain(name)]) for name in class_names])


def _as_mapping(groups: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    return groups if isinstance(groups, Mapping) else read_groups(groups)


def _from_wordnet(class_names: Sequence[str], edges: list[tuple[str, str]], n: int) -> Tensor:
    known = {child for _, child in edges}
    if unknown := [name for name in class_names if name not in known]:
        raise DataError(
            f"{len(unknown)} classes are no WordNet ids of ImageNet, first {unknown[0]!r}: pass groups= or "
            "grouping='clustering'."
        )
    return wordnet_groups(edges, class_names, n)


def _plain(name: str) -> str:
    return str(name).replace("_", " ").strip()
