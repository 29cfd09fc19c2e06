"""The equations of SeTAR: low-rank truncation of one weight, the loss of the search, and its acceptance rule.

SeTAR drops some singular values, SeTAR+FT makes them trainable. float64 stays float64, everything else is computed in
float32. Equations: Li et al., NeurIPS 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ood_core import check
from torch import Tensor

__all__ = [
    "LossTerms",
    "accept",
    "compose",
    "dropped_rank",
    "loss_terms",
    "pseudo_ood_cells",
    "search_loss",
    "split_low_rank",
    "truncate",
]


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
    full = min(check.integer("size", size, 1, 2**62) for size in sizes)
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
    check.choice("drop", drop, ("minor", "principal", "random"))
    rank = dropped_rank(weight.shape, ratio)
    if rank == 0:
        return weight.clone()
    return compose(torch.linalg.svd(weight, full_matrices=False), rank, drop=drop, generator=generator)


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
    u, s, vh = factors = torch.linalg.svd(weight, full_matrices=False)
    root = s[-rank:].sqrt()
    return compose(factors, rank), u[:, -rank:] * root, root[:, None] * vh[-rank:]


def compose(
    factors: Sequence[Tensor], rank: int, *, drop: str = "minor", generator: torch.Generator | None = None
) -> Tensor:
    """The matrix of a decomposition without `rank` of its singular values: `truncate` with the SVD done already.

    Args:
        factors: U [out, full], S [full] descending and V^T [full, in], as `torch.linalg.svd` gives them.
        rank: how many singular values to drop, 0 to full - 1.
        drop: see `truncate`.
        generator: see `truncate`.

    Returns:
        [out, in].

    Example:
        >>> compose(torch.linalg.svd(torch.diag(torch.tensor([3.0, 2.0]))), 1).diag().abs()
        tensor([3., 0.])
    """
    u, s, vh = factors
    index = _kept(len(s), rank, drop, generator).to(s.device)
    return (u[:, index] * s[index]) @ vh[index]


class LossTerms(NamedTuple):
    """The parts of the search loss of N images; those of several batches may be concatenated.

    Attributes:
        cross_entropy: of the image's own class [N].
        negative_entropy: summed over the image's pseudo-OOD cells [N].
        cells: number of these cells [N].
        correct: whether the own class has the largest global logit, bool [N].
    """

    cross_entropy: Tensor
    negative_entropy: Tensor
    cells: Tensor
    correct: Tensor

    def id_loss(self) -> Tensor:
        """L_ID: mean cross-entropy."""
        return self.cross_entropy.mean()

    def ood_loss(self) -> Tensor:
        """L_OOD: mean over the cells of all images together; 0 if there are none."""
        return self.negative_entropy.sum() / self.cells.sum().clamp(min=1)


def pseudo_ood_cells(local_logits: Tensor, labels: Tensor, *, k: int) -> Tensor:
    """Cells that do not look like their image's class: it is not among the `k` largest logits there.

    Args:
        local_logits: [N, P, C].
        labels: classes [N].
        k: 1 to C; with C no cell is one.

    Returns:
        bool [N, P]. Equal logits count for the class, which a sort would leave to chance.

    Source: the set J of the search loss.

    Example:
        >>> pseudo_ood_cells(torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]]), torch.tensor([0]), k=2)
        tensor([[False,  True]])
    """
    own = local_logits.gather(-1, labels.view(-1, 1, 1).expand(-1, local_logits.shape[1], 1))
    return (local_logits > own).sum(-1) >= k


def loss_terms(global_logits: Tensor, local_logits: Tensor, labels: Tensor, *, k: int) -> LossTerms:
    """What the search loss sums up, image by image.

    Args:
        global_logits: [N, C].
        local_logits: [N, P, C].
        labels: true classes, int64 [N].
        k: see `search_loss`.

    Returns:
        `LossTerms`, differentiable.

    Raises:
        TypeError, ValueError: as `search_loss`.
    """
    global_logits, local_logits = check.tensors(
        global_logits=(global_logits, "N C"), local_logits=(local_logits, "N P C")
    )
    count, classes = global_logits.shape
    labels = check.labels("labels", labels, count, classes)
    check.integer("k", k, 1, classes, "the number of classes")
    cells = pseudo_ood_cells(local_logits, labels, k=k)
    share = local_logits[cells].softmax(-1)
    of_cells = (share * (share + 1e-5).log()).sum(-1)
    summed = of_cells.new_zeros(count).index_add(0, cells.nonzero()[:, 0], of_cells)
    correct = global_logits.argmax(-1) == labels
    return LossTerms(F.cross_entropy(global_logits, labels, reduction="none"), summed, cells.sum(1), correct)


def search_loss(global_logits: Tensor, local_logits: Tensor, labels: Tensor, *, k: int, weight: float) -> Tensor:
    """L = L_ID + weight * L_OOD: classify images, and be unsure of cells that do not look like their class.

    L_ID is the cross-entropy of the global logits. L_OOD is minus the entropy of the pseudo-OOD cells' softmax,
    averaged over those of the whole batch; 0 if there are none.

    Args:
        global_logits: scaled logits [N, C] of the images.
        local_logits: scaled logits [N, P, C] of their cells.
        labels: true classes, int64 [N].
        k: a cell is pseudo-OOD if its class is not among its `k` largest logits, 1 to C.
        weight: lambda, factor of L_OOD, finite.

    Returns:
        Scalar, to be minimised.

    Raises:
        TypeError: not floating-point logits or integer labels, or a `weight` that is no number.
        ValueError: shapes that do not fit, NaN, empty, labels or `k` out of range, or a `weight` not finite.

    Source: LoCoOp's loss, as SeTAR uses it; log(pi + 1e-5) as in the released code.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> search_loss(logits, logits[:, None], torch.tensor([0]), k=2, weight=0.1)
        tensor(0.1269)
    """
    check_weight(weight)
    terms = loss_terms(global_logits, local_logits, labels, k=k)
    return terms.id_loss() + weight * terms.ood_loss()


def check_weight(weight: float) -> None:
    """Refuse a lambda that is no finite number.

    Raises:
        TypeError: not a number.
        ValueError: infinite or NaN.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"weight must be a number, got {weight!r}.")
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight} must be finite.")


def accept(incumbent: float, candidates: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The search's decision on one weight: the first of the best values, if strictly below the incumbent.

    Args:
        incumbent: best value so far in the whole search, infinity at its start.
        candidates: (ratio, value) pairs; values are minimised.

    Returns:
        (ratio chosen, incumbent afterwards); (0.0, `incumbent`) if nothing is better.

    Source: the released code's acceptance rule.

    Example:
        >>> accept(0.5, [(0.05, 0.6), (0.1, 0.4), (0.2, 0.4)])
        (0.1, 0.4)
    """
    chosen = 0.0
    for ratio, value in sorted(candidates, key=lambda pair: pair[0]):
        if value < incumbent:
            chosen, incumbent = ratio, value
    return chosen, incumbent


def _kept(full: int, rank: int, drop: str, generator: torch.Generator | None) -> Tensor:
    """Ascending indices of the singular values that stay."""
    if drop == "minor":
        return torch.arange(full - rank)
    if drop == "principal":
        return torch.arange(rank, full)
    device = generator.device if generator is not None else "cpu"
    return torch.randperm(full, generator=generator, device=device)[rank:].sort().values


def _finite_matrix(weight: Tensor) -> Tensor:
    (weight,) = check.tensors(weight=(weight, "out in"))
    if not weight.isfinite().all():
        raise ValueError(f"weight holds {int(weight.isinf().sum())} infinite values.")
    return weight
