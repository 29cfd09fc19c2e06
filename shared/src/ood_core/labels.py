"""Class names: which may be given, and when two of them are the same."""

from __future__ import annotations

__all__ = ["check_class_names", "match_labels", "plain_name", "told_apart"]

import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from ood_core.errors import UsageError


def plain_name(name: str) -> str:
    """What of a name counts: composed characters (NFC; macOS writes folders decomposed), underscores as spaces.

    Blanks around the name and repeated ones within do not count.

    Example:
        >>> plain_name(" great_white  shark")
        'great white shark'
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def check_class_names(names: Any, *, what: str = "class_names") -> list[str]:
    """Class names as a list of strings with composed characters; None is no name.

    Args:
        names: a list, tuple, array, pandas column or other ordered collection of strings.
        what: what to call them in an error.

    Raises:
        TypeError: a string, a mapping, a set, or names that are no strings.
        UsageError: an empty name, or one given twice (`plain_name` says when two are the same).

    Example:
        >>> check_class_names(np.array(["cat", "dog"]))
        ['cat', 'dog']
    """
    checked = [_text(name, index, what) for index, name in enumerate(_listed(names, what))]
    if empty := [index for index, name in enumerate(checked) if not plain_name(name)]:
        raise UsageError(f"Class name {empty[0]} of {len(checked)} is empty: name it, or leave it out.")
    if twice := _twice(checked):
        first, second = twice[0]
        kinds = repr(first) if first == second else f"{first!r} (also written {second!r})"
        others = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise UsageError(
            f"{what}: {kinds} is given twice{others}: no image could be told to be of the one or the other. "
            "Rename one, or leave it out."
        )
    return checked


def _listed(names: Any, what: str) -> list[Any]:
    if names is None:
        return []
    if isinstance(names, str | bytes):
        raise TypeError(f"{what} must be a list of names, got the string {names!r}.")
    if isinstance(names, Mapping):
        raise TypeError(f"{what} must be a list of names in the order of the classes, got a dict: list its values.")
    if isinstance(names, Set) or not isinstance(names, Iterable):
        kind = type(names).__name__
        raise TypeError(f"{what} must be a list of names in the order of the classes, got {kind}, which has no order.")
    try:
        return list(names)
    except TypeError as error:  # an array without dimensions
        raise TypeError(f"{what} must be a list of names, got {names!r}.") from error


def _text(name: Any, index: int, what: str) -> str:
    if not isinstance(name, str):  # numpy's strings are str
        remedy = "leave it out" if name is None else f"write str({name!r}), or better what it means"
        raise TypeError(f"{what}[{index}] is {name!r} ({type(name).__name__}), not a text: {remedy}.")
    return unicodedata.normalize("NFC", str(name))


def _twice(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every name that is there already, behind the one it equals."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(plain_name(name), name), index) for index, name in enumerate(names)]
    seen: set[str] = set()
    found = []
    for earlier, index in pairs:
        if earlier in seen:
            found.append((earlier, names[index]))
        seen.add(earlier)
    return found


def told_apart(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names, with those that are given more than once replaced by the `others` at their places.

    Args:
        names: C names.
        others: C names of the same classes, from another list.

    Example:
        >>> told_apart(["missile", "cat", "missile"], ["missile", "kitten", "projectile"])
        ['missile', 'cat', 'projectile']
    """
    plain = [plain_name(name) for name in names]
    return [b if plain.count(p) > 1 else a for a, b, p in zip(names, others, plain, strict=True)]


def match_labels(label_names: Sequence[str], class_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Find each label among a detector's classes, by name (`plain_name` says when two names are the same).

    Args:
        label_names: the labels of a source.
        class_names: the classes; where one occurs twice, the first counts.

    Returns:
        int64 [len(label_names)], the position in `class_names` or -1, and the names that are not there.

    Example:
        >>> match_labels(["ring_tail", "fox"], ["cat", "ring tail"])
        (array([ 1, -1]), ['fox'])
    """
    known = {plain_name(name): position for position, name in reversed([*enumerate(class_names)])}
    mapping = np.array([known.get(plain_name(name), -1) for name in label_names], np.int64)
    return mapping, [name for name, position in zip(label_names, mapping, strict=True) if position < 0]
