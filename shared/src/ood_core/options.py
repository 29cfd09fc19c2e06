"""Options declared once, in groups: a name, a default, and what the value may be.

A group is a frozen dataclass of `option` fields. A function or constructor takes groups as keyword arguments, and
with `flat_options` the names of their fields, too.

Example:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Training(Options):
    ...     epochs: int = option(10, integer(1))
    ...     clip: float = option(1.0, check.positive)
    >>> @flat_options
    ... def fit(*, training: Training = Training()):
    ...     return training.epochs
    >>> fit(epochs=3), fit(training=Training(epochs=4)), fit()
    (3, 4, 10)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar, cast

from ood_core import check
from ood_core.errors import UsageError, unknown_name

__all__ = [
    "Constraint",
    "Options",
    "expose",
    "flat_options",
    "groups_of",
    "integer",
    "method_options",
    "one_of",
    "option",
    "option_names",
    "optional",
    "owners",
]

Constraint = Callable[[str, Any], Any]
"""(name, value) -> the value to keep; raises for one that cannot be."""

F = TypeVar("F", bound=Callable[..., Any])


def option(default: Any, constraint: Constraint | None = None) -> Any:
    """A field of a group.

    Args:
        default: its value where none is given.
        constraint: what a value must pass, e.g. `check.positive`; None takes any.
    """
    return field(default=default, metadata={"constraint": constraint})


def integer(low: int) -> Constraint:
    """An integer that is not below `low`."""
    return lambda name, value: check.integer(name, value, low, 2**31)


def one_of(*allowed: Any) -> Constraint:
    """One of a few values."""
    return lambda name, value: check.choice(name, value, allowed)


def optional(constraint: Constraint) -> Constraint:
    """None, or what the constraint takes."""
    return lambda name, value: None if value is None else constraint(name, value)


@dataclass(frozen=True)
class Options:
    """Base of groups; every field is checked when a group is made.

    Raises:
        TypeError, ValueError: a value that its constraint refuses.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            if constraint := one.metadata.get("constraint"):
                object.__setattr__(self, one.name, constraint(one.name, getattr(self, one.name)))


def groups_of(function: Callable[..., Any]) -> dict[str, Options]:
    """Groups that a function takes, with their defaults: the parameters whose default is a group."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if isinstance(one.default, Options)}


def option_names(function: Callable[..., Any], *others: str) -> list[str]:
    """Names of a function's options, with those of its groups in place of the groups.

    Args:
        function: what is asked about.
        *others: its parameters that are no options.
    """
    groups = groups_of(function)
    own = [name for name in inspect.signature(function).parameters if name not in others]
    return [option for name in own for option in (_names(groups[name]) if name in groups else [name])]


def _names(group: Options) -> list[str]:
    return [one.name for one in fields(group)]


# Parameters of a detector's `__init__` that are no options of its method.
_COMMON = ("self", "class_names", "template", "members", "common", "unknown")


def method_options(detector: type) -> list[str]:
    """Names of a method's options: the parameters of its detector that are its own, groups by their options.

    Example:
        >>> from ood_core.detectors.knn import KNN
        >>> method_options(KNN)
        ['k']
    """
    return option_names(detector.__init__, *_COMMON)  # type: ignore[misc]


def owners(groups: Mapping[str, Options]) -> dict[str, str]:
    """Name of an option -> name of its group."""
    return {option: name for name, group in groups.items() for option in _names(group)}


def flat_options(function: F) -> F:
    """Let a function take the options of its groups under their own names, too.

    A name that is neither is an error, but for a function with `**keywords`, which gets it.

    Raises:
        UsageError: when called with an option and its group, or an unknown name.
    """
    groups, parameters = groups_of(function), inspect.signature(function).parameters
    owner = owners(groups)
    takes_more = any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    @wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        flat = {name: given.pop(name) for name in list(given) if name in owner}
        if both := [name for name in flat if owner[name] in given]:
            raise UsageError(f"{both[0]}= is an option of {owner[both[0]]}=: give one of the two.")
        if not takes_more and (unknown := [name for name in given if name not in parameters]):
            raise unknown_name(f"option of {function.__name__}", unknown[0], [*option_names(function), *groups])
        for group in {owner[name] for name in flat}:
            mine = {name: value for name, value in flat.items() if owner[name] == group}
            given[group] = replace(groups[group], **mine)
        return function(*args, **given)

    return cast(F, called)


def expose(cls: type) -> None:
    """Let the options of a class's groups be read, and set, as attributes of its objects.

    Args:
        cls: its constructor keeps every group under the group's name.
    """
    for option, group in owners(groups_of(cls.__init__)).items():  # type: ignore[misc]
        setattr(cls, option, _view(group, option))


def _view(group: str, option: str) -> property:
    def put(self: Any, value: Any) -> None:
        setattr(self, group, replace(getattr(self, group), **{option: value}))

    return property(attrgetter(f"{group}.{option}"), put)
