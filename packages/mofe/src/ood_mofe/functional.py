"""The router and Dynamic-beta Mixup as pure functions on tensors.

float64 stays float64, everything else is computed in float32. B images, D width, E experts, C classes.
Equations: Zhao et al., ICCV 2025.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from ood_core import _check
from torch import Tensor

__all__ = ["beta_concentration", "fold_lambda", "mixup", "route", "routing_loss"]


def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The expert of each image: the argmax of softmax(x W).

    Args:
        x: router inputs [B, D].
        weight: [D, E].

    Returns:
        (expert int64 [B], probability [B, E]); ties go to the lowest index.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, or NaN.

    Source: Eq. 6.

    Example:
        >>> import torch
        >>> expert, probability = route(torch.tensor([[0.0, 1.0]]), torch.eye(2))
        >>> expert, probability.round(decimals=4)
        (tensor([1]), tensor([[0.2689, 0.7311]]))
    """
    x, weight = _check.tensors(x=(x, "B D"), weight=(weight, "D E"))
    logits = x @ weight
    # Of the logits, not of the probabilities, which may round to a tie.
    return logits.argmax(-1), logits.softmax(-1)


def routing_loss(logits: Tensor, expert: Tensor) -> Tensor:
    """Cross-entropy between the router and the experts that own the images' classes.

    Args:
        logits: router outputs [B, E].
        expert: int64 [B] in [0, E), the expert of each image's true class.

    Returns:
        Scalar, at least 0: the mean of -log softmax(logits)[expert].

    Raises:
        TypeError: `logits` not floating point, or `expert` not integer.
        ValueError: shapes that do not fit, NaN, an expert out of range, tensors on different devices.

    Source: Eq. 8.

    Example:
        >>> import torch
        >>> routing_loss(torch.zeros(2, 4), torch.tensor([0, 3])).round(decimals=4)
        tensor(1.3863)
    """
    (logits,) = _check.tensors(logits=(logits, "B E"))
    return F.cross_entropy(logits, _indices("expert", expert, logits, logits.shape[1]))


def beta_concentration(accuracy: Tensor, *, w: float, floor: float = 0.05) -> Tensor:
    """Concentration of each class's Beta distribution: low (little mixing) for classes already accurate.

    Args:
        accuracy: [C] in [0, 1], validation accuracy of each class.
        w: how much of the accuracy counts, at least 0; 0 gives 1 for every class.
        floor: least value, above 0.

    Returns:
        [C]: max(1 - w * accuracy, floor).

    Raises:
        TypeError: `accuracy` not a floating-point tensor, `w` or `floor` no number.
        ValueError: wrong rank, NaN, or a value out of range.

    Source: sigma of Dynamic-beta Mixup, Eq. 11-13; the floor is ours.

    Example:
        >>> import torch
        >>> beta_concentration(torch.tensor([0.0, 0.5, 1.0]), w=0.8)
        tensor([1.0000, 0.6000, 0.2000])
    """
    (accuracy,) = _check.tensors(accuracy=(accuracy, "C"))
    _within_unit("accuracy", accuracy)
    if isinstance(w, bool) or not isinstance(w, int | float):
        raise TypeError(f"w must be a number, got {w!r}.")
    if not 0 <= w < float("inf"):
        raise ValueError(f"w={w} must be a finite number, at least 0.")
    return (1 - w * accuracy).clamp_min(_check.positive("floor", floor))


def fold_lambda(lam: Tensor) -> Tensor:
    """The larger share of each mix: max(lambda, 1 - lambda).

    Args:
        lam: any shape, in [0, 1].

    Returns:
        The same shape, in [0.5, 1].

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: empty, NaN, or values outside [0, 1].

    Source: the folded lambda of Dynamic-beta Mixup, Eq. 11-13.

    Example:
        >>> import torch
        >>> fold_lambda(torch.tensor([0.25, 0.75]))
        tensor([0.7500, 0.7500])
    """
    (lam,) = _check.tensors(lam=(lam, _letters(lam)))
    _within_unit("lam", lam)
    return lam.maximum(1 - lam)


def mixup(x: Tensor, y_one_hot: Tensor, lam: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Blend every item and its target with those of a partner from the batch.

    Args:
        x: [B, ...] images or tokens.
        y_one_hot: [B, C] targets in [0, 1]; integers, as from `torch.nn.functional.one_hot`, do as well.
        lam: [B] in [0, 1], the share of the item itself.
        partner: int64 [B] in [0, B), the item to blend with.

    Returns:
        (x, y): lam * item + (1 - lam) * partner, [B, ...] and [B, C].

    Raises:
        TypeError: `x` or `lam` not floating point, or `partner` not integer.
        ValueError: shapes that do not fit, NaN, values out of range, tensors on different devices.

    Source: the mixed image and target of Dynamic-beta Mixup, Eq. 11-13.

    Example:
        >>> import torch
        >>> lam, partner = torch.tensor([0.75, 1.0]), torch.tensor([1, 0])
        >>> x, y = mixup(torch.tensor([[1.0], [3.0]]), torch.eye(2), lam, partner)
        >>> x.flatten(), y
        (tensor([1.5000, 3.0000]), tensor([[0.7500, 0.2500],
                [0.0000, 1.0000]]))
    """
    if isinstance(y_one_hot, Tensor) and not (y_one_hot.is_floating_point() or y_one_hot.is_complex()):
        y_one_hot = y_one_hot.float()
    x, y, lam = _check.tensors(x=(x, _letters(x, "B")), y_one_hot=(y_one_hot, "B C"), lam=(lam, "B"))
    _within_unit("y_one_hot", y)
    _within_unit("lam", lam)
    index = _indices("partner", partner, lam, len(lam))
    return _blend(x, lam, index), _blend(y, lam, index)


def _blend(x: Tensor, lam: Tensor, index: Tensor) -> Tensor:
    share = lam.view(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x[index]


def _indices(name: str, value: Any, rows: Tensor, count: int) -> Tensor:
    """Indices in [0, count), one per row, on the device of the rows."""
    if isinstance(value, Tensor) and value.device != rows.device:
        raise ValueError(f"{name} is on {value.device}, the other tensors are on {rows.device}: move it there.")
    return _check.labels(name, value, len(rows), count)


def _within_unit(name: str, value: Tensor) -> None:
    low, high = value.detach().min().item(), value.detach().max().item()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1], got {low:.6g} to {high:.6g}.")


def _letters(value: Any, *first: str) -> str:
    """Dimension letters of a tensor of any rank that starts with the given ones."""
    rank = getattr(value, "ndim", len(first))
    return " ".join([*first, *(f"n{i}" for i in range(len(first), rank))])
