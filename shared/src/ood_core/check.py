"""Validation of tensor arguments, apart from the computations that use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensors(**arguments: tuple[Any, str]) -> list[Any]:
    """Check floating-point tensors against named dimensions and bring them to one precision.

    Each argument is `name=(tensor, "N P d")`. A letter stands for one size in all arguments together; a name may
    be None (an optional argument left out) and stays None. float64 stays float64 (for all, if any is), everything
    else becomes float32.

    Returns:
        The tensors in the order given.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: wrong rank, a size that contradicts another argument, empty, NaN, or mixed devices.
    """
    sizes: dict[str, tuple[int, str]] = {}
    given = {name: value for name, (value, _) in arguments.items() if value is not None}
    for name, value in given.items():
        _check_shape(name, value, arguments[name][1].split(), sizes)
    devices = {name: value.device for name, value in given.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"Tensors are on different devices ({where}): move them to one.")
    for name, value in given.items():
        # The sum is many times as fast as a mask; it is NaN for infinities of both signs, too.
        if value.detach().sum().isnan() and value.isnan().any():
            raise ValueError(f"{name} holds NaN ({int(value.isnan().sum())} of {value.numel()} values).")
    wide = any(value.dtype == torch.float64 for value in given.values())
    dtype = torch.float64 if wide else torch.float32
    return [None if value is None else value.to(dtype) for value, _ in arguments.values()]


def _check_shape(name: str, value: Any, letters: list[str], sizes: dict[str, tuple[int, str]]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}.")
    shape = list(value.shape)
    if len(shape) != len(letters):
        raise ValueError(f"{name} must have shape [{', '.join(letters)}], got {shape}.")
    for letter, size in zip(letters, shape, strict=True):
        known, owner = sizes.setdefault(letter, (size, name))
        if size != known:
            raise ValueError(f"{name} has shape {shape}, but {letter} is {known} in {owner}.")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty: shape {shape}.")


def labels(name: str, value: Any, count: int, classes: int) -> Tensor:
    """Check integer labels [count] in [0, classes); returns them as int64.

    Raises:
        TypeError: not an integer tensor.
        ValueError: wrong length, or a label out of range.
    """
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {getattr(value, 'dtype', type(value).__name__)}.")
    if list(value.shape) != [count]:
        raise ValueError(f"{name} must have shape [{count}], got {list(value.shape)}.")
    if count and not 0 <= int(value.min()) <= int(value.max()) < classes:
        raise ValueError(f"{name} must lie in [0, {classes}), got {int(value.min())} to {int(value.max())}.")
    return value.long()


def integer(name: str, value: Any, low: int, high: int, why: str = "") -> int:
    """Check an integer in [low, high].

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low}, {high}]{f' ({why})' if why else ''}.")
    return value


def positive(name: str, value: Any) -> float:
    """Check a finite number above zero.

    Raises:
        TypeError: not a number.
        ValueError: zero, negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} must be a finite number above 0.")
    return float(value)


def factor(name: str, value: Any) -> float:
    """Check the factor of a term: a finite number, at least 0.

    Raises:
        TypeError: not a number.
        ValueError: negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value} must be a finite number, at least 0.")
    return float(value)


def share(name: str, value: Any) -> float:
    """Check a share above 0 and at most 1.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if positive(name, value) > 1:
        raise ValueError(f"{name}={value} must be at most 1, the whole.")
    return float(value)


def part(name: str, value: Any) -> float:
    """Check a share in [0, 1): of something that must not be all of it.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if not factor(name, value) < 1:
        raise ValueError(f"{name}={value!r} must be a share in [0, 1).")
    return float(value)


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """Check one of a few words.

    Raises:
        ValueError: any other value.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}.")
    return value
