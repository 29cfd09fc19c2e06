"""A check by name, and the sentences in which one fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Check", "close", "one_thread", "refused", "require", "same"]


@dataclass(frozen=True)
class Check:
    """One thing that must hold of one detector or backbone; call it.

    Attributes:
        subject: the name of the detector, or the spec of the backbone.
        function: what is called, with `on`.
        on: the detector or backbone with what is made of it, shared by all its checks.

    Example:
        >>> from ood_core.testing import detector_checks
        >>> check = detector_checks("knn")[0]
        >>> print(check)
        knn-one_finite_score_per_image
        >>> check()
    """

    subject: str
    function: Callable[[Any], None]
    on: Any = field(repr=False)

    def __call__(self) -> None:
        """Check it.

        Raises:
            AssertionError: it does not hold; the message says what was expected.
        """
        with one_thread():
            try:
                self.function(self.on)
            except AssertionError as failure:
                raise AssertionError(f"{self}: {failure}") from failure

    def __str__(self) -> str:
        return f"{self.subject}-{self.function.__name__}"


@contextmanager
def one_thread() -> Iterator[None]:
    """The sums of several threads differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def require(holds: object, sentence: str) -> None:
    """Fail with the sentence unless it holds."""
    if not holds:
        raise AssertionError(sentence)


def same(found: Tensor, expected: Tensor, sentence: str) -> None:
    """Fail unless two tensors are equal bit by bit."""
    require(torch.equal(found, expected), f"{sentence} {_difference(found, expected)}")


def close(found: Tensor, expected: Tensor, sentence: str, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Fail unless two tensors are equal but for rounding: that of float32 sums in another order."""
    equal = found.shape == expected.shape and torch.allclose(found, expected, rtol=rtol, atol=atol)
    require(equal, f"{sentence} {_difference(found, expected)}")


def _difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"Got the shape {list(found.shape)}, not {list(expected.shape)}."
    return f"The largest difference is {(found.double() - expected.double()).abs().max().item():.3g}."


def refused(what: str, kind: type[Exception], words: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Fail unless a call raises an error of this kind whose message has the words (a regular expression)."""
    try:
        call(*args, **options)
    except kind as error:
        require(re.search(words, str(error)), f"{what} must be refused with the words {words!r}, not: {error}")
    except Exception as error:
        raise AssertionError(f"{what} must raise {kind.__name__}, not {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"{what} must raise {kind.__name__}, but nothing was raised.")
