"""Low-rank truncation of one weight: SeTAR drops some singular values, SeTAR+FT makes them trainable.

float64 stays float64, everything else is computed in float32. Equations: Li et al., NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ood_core import _check
from torch import Tensor

__all__ = ["dropped_rank", "split_low_rank", "truncate"]


def dropped_rank(shape: Sequence[int], ratio: float) -> int:
    """How many singular values of a matrix a ratio drops: round(min(shape) * ratio), ties to the even number.

    Args:
        shape: (rows, columns) of the weight.
        ratio: share of the singular values to drop, in [0, 1).

    Returns:
        The rank dropped, 0 to min(shape) - 1.

    Raises:
        TypeError: a size that is no integer, or a ratio that is no number.
        ValueError: not two positive sizes, a ratio outside [0, 1), or one that rounds to all singular values.

    Source: the released code's rank rule.

    Example:
        >>> dropped_rank((3072, 768), 0.05), dropped_rank((50, 80), 0.05)
        (38, 2)
    """
    sizes = list(shape)
    if len(sizes) != 2:
        raise ValueError(f"shape must be (rows, columns), got {tuple(sizes)}.")
    full = min(_check.integer("size", size, 1, 2**62) for size in sizes)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"ratio must be a number, got {ratio!r}.")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is outside [0, 1): it is the share of singular values to drop.")
    rank = round(full * ratio)
    if rank == full:
        raise ValueError(f"ratio={ratio} drops all {full} singular values of a {sizes[0]}x{sizes[1]} weight.")
    return rank


def truncate(weight: Tensor, ratio: float, *, drop: str = "minor", generator: torch.Generator | None = None) -> Tensor:
    """A weight without a share of its singular values.

    Args:
        weight: [out, in], finite.
        ratio: share of the singular values to drop, in [0, 1); one that rounds to none copies the weight
            exactly.
        drop: "minor": the smallest; "principal": the largest; "random": the first of one random permutation.
        generator: source of the permutation for `drop="random"`; None is torch's own.

    Returns:
        [out, in], a new tensor of rank min(out, in) - `dropped_rank`.

    Raises:
        TypeError: not a floating-point tensor, or a ratio that is no number.
        ValueError: wrong rank, not finite, a ratio out of range (see `dropped_rank`), unknown `drop`.

    Source: W = sum_i s_i u_i v_i^T over the kept singular values.

    Example:
        >>> truncate(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])), 0.5).diag().abs()
        tensor([3., 2., 0., 0.])
    """
    weight = _finite_matrix(weight)
    _check.choice("drop", drop, ("minor", "principal", "random"))
    rank = dropped_rank(weight.shape, ratio)
    if rank == 0:
        return weight.clone()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return _compose(u, s, vh, _kept(len(s), rank, drop, generator))


def split_low_rank(weight: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as its truncation plus the product of two low-rank factors: weight = kept + B A.

    Args:
        weight: [out, in], finite.
        ratio: share of the singular values (the smallest) that goes to the factors, in [0, 1).

    Returns:
        (kept [out, in], B [out, r], A [r, in]): `truncate(weight, ratio)`, U_r sqrt(S_r) and sqrt(S_r) V_r^T
        with r = `dropped_rank(weight.shape, ratio)`; B and A are empty for r = 0.

    Raises:
        TypeError: not a floating-point tensor, or a ratio that is no number.
        ValueError: wrong rank, not finite, or a ratio out of range (see `dropped_rank`).

    Source: the start of SeTAR+FT, where B and A are trained and `kept` is frozen.

    Example:
        >>> kept, b, a = split_low_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.25])), 0.25)
        >>> kept.diag().abs(), (b @ a).diag().abs()
        (tensor([3., 2., 1., 0.]), tensor([0.0000, 0.0000, 0.0000, 0.2500]))
    """
    weight = _finite_matrix(weight)
    rank = dropped_rank(weight.shape, ratio)
    if rank == 0:
        return weight.clone(), weight[:, :0].clone(), weight[:0].clone()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    kept = _compose(u, s, vh, _kept(len(s), rank, "minor", None))
    root = s[-rank:].sqrt()
    return kept, u[:, -rank:] * root, root[:, None] * vh[-rank:]


def _kept(full: int, rank: int, drop: str, generator: torch.Generator | None) -> Tensor:
    """Ascending indices of the singular values that stay."""
    if drop == "minor":
        return torch.arange(full - rank)
    if drop == "principal":
        return torch.arange(rank, full)
    device = generator.device if generator is not None else "cpu"
    return torch.randperm(full, generator=generator, device=device)[rank:].sort().values


def _compose(u: Tensor, s: Tensor, vh: Tensor, index: Tensor) -> Tensor:
    """The matrix of some of the singular values."""
    index = index.to(s.device)
    return (u[:, index] * s[index]) @ vh[index]


def _finite_matrix(weight: Tensor) -> Tensor:
    (weight,) = _check.tensors(weight=(weight, "out in"))
    if not weight.isfinite().all():
        raise ValueError(f"weight holds {int(weight.isinf().sum())} infinite values.")
    return weight
