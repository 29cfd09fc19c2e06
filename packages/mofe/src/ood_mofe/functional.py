"""The equations of MoFE as pure functions on tensors: router, class groups, experts, Dynamic-beta Mixup, scores.

float64 stays float64, everything else is computed in float32. B images, T tokens, D width, E experts, C classes.
Equations: Zhao et al., ICCV 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ood_core import check
from ood_core.functional import unsaturated
from torch import Tensor

from ood_mofe.groups import cluster_classes, partition_classes, wordnet_groups
from ood_mofe.ops import expert_class_token, expert_tokens

__all__ = [
    "CLIP_LOGIT_SCALE",
    "atd",
    "beta_concentration",
    "cluster_classes",
    "ctw",
    "draw_partners",
    "expert_class_token",
    "expert_loss",
    "expert_tokens",
    "fold_lambda",
    "mix_experts",
    "mixup",
    "mixup_loss",
    "mos",
    "norm_regulariser",
    "partition_classes",
    "route",
    "routing_loss",
    "wordnet_groups",
]

CLIP_LOGIT_SCALE = 100.0
"""Factor of the cosines in OpenAI's published CLIP models; other backbones say theirs as `logit_scale`."""


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
        >>> expert, probability = route(torch.tensor([[0.0, 1.0]]), torch.eye(2))
        >>> expert, probability.round(decimals=4)
        (tensor([1]), tensor([[0.2689, 0.7311]]))
    """
    x, weight = check.tensors(x=(x, "B D"), weight=(weight, "D E"))
    logits = x @ weight
    # Of the logits, not of the probabilities, which may round to a tie.
    return logits.argmax(-1), logits.softmax(-1)


def mix_experts(results: Tensor, probability: Tensor) -> Tensor:
    """What the chosen experts make of an image, weighted by the router's probabilities.

    Args:
        results: [B, K, D], result of each of the K experts that an image goes to.
        probability: [B, K] in [0, 1], of these experts; their sum is 1 only if all experts are among them.

    Returns:
        [B, D]: sum_k P_k E_k.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, or a probability out of range.

    Source: Eq. 7.

    Example:
        >>> mix_experts(torch.tensor([[[4.0, 0.0], [0.0, 8.0]]]), torch.tensor([[0.5, 0.25]]))
        tensor([[2., 2.]])
    """
    results, probability = check.tensors(results=(results, "B K D"), probability=(probability, "B K"))
    _within_unit("probability", probability)
    return _weighted(results, probability)


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
        >>> routing_loss(torch.zeros(2, 4), torch.tensor([0, 3])).round(decimals=4)
        tensor(1.3863)
    """
    (logits,) = check.tensors(logits=(logits, "B E"))
    return F.cross_entropy(logits, _indices("expert", expert, logits, logits.shape[1]))


def expert_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (image, expert) rows over the expert's own classes and "others".

    Args:
        logits: [R, Q], experts with fewer outputs than Q padded with -inf.
        targets: int64 [R], the class inside the expert, or its last output for an image of other experts.

    Returns:
        Scalar, at least 0.

    Raises:
        TypeError: `logits` not floating point, or `targets` not integer.
        ValueError: shapes that do not fit, NaN, a target out of range or on padding, tensors on different devices.

    Source: Eq. 9, the mean over all rows.

    Example:
        >>> expert_loss(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([1])).round(decimals=4)
        tensor(0.6931)
    """
    (logits,) = check.tensors(logits=(logits, "R Q"))
    targets = _indices("targets", targets, logits, logits.shape[1])
    losses = F.cross_entropy(logits, targets, reduction="none")
    if not losses.isfinite().all():
        row = int((~losses.isfinite()).nonzero()[0])
        raise ValueError(f"targets[{row}]={int(targets[row])} has the logit -inf: that output is padding.")
    return losses.mean()


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

    Source: sigma of Dynamic-beta Mixup (Eq. 11-13); the floor is ours.

    Example:
        >>> beta_concentration(torch.tensor([0.0, 0.5, 1.0]), w=0.8)
        tensor([1.0000, 0.6000, 0.2000])
    """
    (accuracy,) = check.tensors(accuracy=(accuracy, "C"))
    _within_unit("accuracy", accuracy)
    if isinstance(w, bool) or not isinstance(w, int | float):
        raise TypeError(f"w must be a number, got {w!r}.")
    if not 0 <= w < float("inf"):
        raise ValueError(f"w={w} must be a finite number, at least 0.")
    return (1 - w * accuracy).clamp_min(check.positive("floor", floor))


def fold_lambda(lam: Tensor) -> Tensor:
    """The larger share of each mix: max(lambda, 1 - lambda).

    Args:
        lam: any shape, in [0, 1].

    Returns:
        The same shape, in [0.5, 1].

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: empty, NaN, or values outside [0, 1].

    Source: the folded lambda of Dynamic-beta Mixup (Eq. 11-13; Eq. 12 is the draw).

    Example:
        >>> fold_lambda(torch.tensor([0.25, 0.75]))
        tensor([0.7500, 0.7500])
    """
    (lam,) = check.tensors(lam=(lam, _letters(lam)))
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

    Source: the mixed image and target of Dynamic-beta Mixup (Eq. 11-13).

    Example:
        >>> lam, partner = torch.tensor([0.75, 1.0]), torch.tensor([1, 0])
        >>> x, y = mixup(torch.tensor([[1.0], [3.0]]), torch.eye(2), lam, partner)
        >>> x.flatten(), y
        (tensor([1.5000, 3.0000]), tensor([[0.7500, 0.2500],
                [0.0000, 1.0000]]))
    """
    if isinstance(y_one_hot, Tensor) and not (y_one_hot.is_floating_point() or y_one_hot.is_complex()):
        y_one_hot = y_one_hot.float()
    x, y, lam = check.tensors(x=(x, _letters(x, "B")), y_one_hot=(y_one_hot, "B C"), lam=(lam, "B"))
    _within_unit("y_one_hot", y)
    _within_unit("lam", lam)
    index = _indices("partner", partner, lam, len(lam))
    return _blend(x, lam, index), _blend(y, lam, index)


def mixup_loss(
    logits: Tensor,
    target: Tensor,
    features: Tensor | None = None,
    *,
    reg: str = "l2",
    reg_weight: float = 0.1,
    smoothing: float = 0.1,
) -> Tensor:
    """Cross-entropy of mixed images with their mixed targets, and what keeps their features small.

    Args:
        logits: [B, C] of the mixed images.
        target: [B, C], as `mixup` gives it: rows that sum to 1.
        features: [B, D] of the mixed images, for `reg="l2"` only.
        reg: "l2" adds `norm_regulariser` of the features; "ls" adds what smooths the labels, smoothing times (mean_c
            of -log p_c minus the cross-entropy); "none" adds nothing.
        reg_weight: of "l2", at least 0.
        smoothing: of "ls", in [0, 1).

    Returns:
        Scalar: -mean_b sum_c y_c log p_c + Reg.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, targets or an option out of range, no features for "l2".

    Source: Eq. 14. The paper leaves Reg open; both forms of it are our reading.

    Example:
        >>> mixup_loss(torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]), torch.ones(1, 3)).round(decimals=4)
        tensor(0.7931)
    """
    check.choice("reg", reg, ("l2", "ls", "none"))
    if reg == "l2" and features is None:
        raise ValueError("reg='l2' is of the features: pass features, or reg='ls' or reg='none'.")
    if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing!r} must be a share in [0, 1).")
    logits, target, features = check.tensors(
        logits=(logits, "B C"), target=(target, "B C"), features=(features if reg == "l2" else None, "B D")
    )
    _within_unit("target", target)
    if ((sums := target.sum(1)) - 1).abs().max() > 1e-3:  # half precision has three digits
        raise ValueError(f"target must have rows that sum to 1, got sums from {sums.min():.6g} to {sums.max():.6g}.")
    loss = F.cross_entropy(logits, target, label_smoothing=smoothing if reg == "ls" else 0.0)
    return loss + norm_regulariser(features, weight=reg_weight) if reg == "l2" else loss


def norm_regulariser(features: Tensor, *, weight: float = 0.1) -> Tensor:
    """The mean square of features, which keeps their norms from growing.

    Args:
        features: [B, D], class tokens of mixed images.
        weight: eta, at least 0.

    Returns:
        Scalar: weight times the mean over images and dimensions of the squared value.

    Raises:
        TypeError: not a floating-point tensor, or `weight` no number.
        ValueError: wrong rank, empty, NaN, or a weight out of range.

    Source: Reg of Eq. 14, in our reading.

    Example:
        >>> norm_regulariser(torch.tensor([[1.0, 3.0]]), weight=0.1)
        tensor(0.5000)
    """
    (features,) = check.tensors(features=(features, "B D"))
    return (weight if weight == 0 else check.positive("weight", weight)) * features.square().mean()


def draw_partners(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For every image another one of a different class, uniformly from the batch.

    Args:
        labels: int64 [B].
        generator: source of the draws; None is torch's own.

    Returns:
        int64 [B]; an image without one of another class is its own partner, which any mix leaves as it is.

    Raises:
        TypeError: not an integer tensor.
        ValueError: not one-dimensional, or empty.

    Source: Dynamic-beta Mixup blends images of different classes.

    Example:
        >>> draw_partners(torch.tensor([0, 1]))
        tensor([1, 0])
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {getattr(labels, 'dtype', type(labels).__name__)}.")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must have shape [B], B at least 1, got {list(labels.shape)}.")
    others = (labels[:, None] != labels).float()
    own = torch.eye(len(labels), device=labels.device)
    weights = torch.where(others.any(1, keepdim=True), others, own)
    device = generator.device if generator is not None else "cpu"
    return torch.multinomial(weights.to(device), 1, generator=generator)[:, 0].to(labels.device)


def mos(group_logits: Sequence[Tensor]) -> Tensor:
    """Minimum "others" score: how surely the most convinced group claims the image.

    Args:
        group_logits: per group [N, Q_e + 1], "others" last.

    Returns:
        [N] in [-1, 0]: max_e of minus the softmax of "others"; higher = more in-distribution.

    Raises:
        TypeError: not a sequence of floating-point tensors.
        ValueError: no group, one without classes, shapes that do not fit, or NaN.

    Source: Huang & Li, "MOS", CVPR 2021.

    Example:
        >>> mos([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])]).round(decimals=4)
        tensor([-0.1192])
    """
    if isinstance(group_logits, Tensor) or not len(group_logits):
        raise ValueError("group_logits must be a list with the logits of at least one group.")
    named = {f"group_{i}": (logits, f"N Q{i}") for i, logits in enumerate(group_logits)}
    groups = check.tensors(**named)
    if small := [i for i, logits in enumerate(groups) if logits.shape[1] < 2]:
        raise ValueError(f"Group {small[0]} has one output: it needs at least one class besides 'others'.")
    return torch.stack([-logits.softmax(-1)[:, -1] for logits in groups]).amax(0)


def ctw(image: Tensor, yes: Tensor, no: Tensor, *, logit_scale: float = CLIP_LOGIT_SCALE) -> Tensor:
    """Competing-to-win: how much rather "yes" than "no" the most likely class is.

    Args:
        image: [N, d] unit norm.
        yes: texts "a photo of a {}" [C, d] unit norm.
        no: texts of the "no" encoder [C, d] unit norm.
        logit_scale: factor of the cosines, above 0: the backbone's; 100 is that of CLIP's published models.

    Returns:
        [N] in [0, 1], higher = more in-distribution.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, or a scale not above 0.

    Source: Wang et al., "CLIPN", ICCV 2023.

    Example:
        >>> ctw(torch.eye(2)[:1], torch.eye(2), torch.eye(2))
        tensor([0.5000])
    """
    logits, odds = _yes_and_no(image, yes, no, logit_scale)
    return odds.gather(1, logits.argmax(1, keepdim=True))[:, 0].sigmoid()


def atd(image: Tensor, yes: Tensor, no: Tensor, *, logit_scale: float = CLIP_LOGIT_SCALE) -> Tensor:
    """Agreeing-to-differ: the share of the class probabilities that "yes" keeps against "no".

    Args:
        image: [N, d] unit norm.
        yes: texts "a photo of a {}" [C, d] unit norm.
        no: texts of the "no" encoder [C, d] unit norm.
        logit_scale: factor of the cosines, above 0: the backbone's; 100 is that of CLIP's published models.

    Returns:
        [N] in [0, 1], higher = more in-distribution: sum_c sigmoid(l_yes - l_no) softmax(l_yes).

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, NaN, or a scale not above 0.

    Source: Wang et al., "CLIPN", ICCV 2023.

    Example:
        >>> atd(torch.eye(2)[:1], torch.eye(2), torch.eye(2))
        tensor([0.5000])
    """
    logits, odds = _yes_and_no(image, yes, no, logit_scale)
    return (odds.sigmoid() * logits.softmax(-1)).sum(-1)


def unsaturated_mos(group_logits: Sequence[Tensor]) -> Tensor:
    """`mos` in the order of the log-odds near -1 and, below the smallest float32, near 0 (see `unsaturated`).

    Args:
        group_logits: per group [N, Q_e + 1], "others" last.

    Example:
        >>> unsaturated_mos([torch.tensor([[0.0, 30.0], [0.0, 0.0]])]).round(decimals=4)
        tensor([-1.0216, -0.5000])
    """
    score = mos(group_logits)
    odds = torch.stack([logits[:, -1] - logits[:, :-1].logsumexp(1) for logits in group_logits]).amin(0).to(score)
    return unsaturated(-unsaturated(-score, F.logsigmoid(-odds)), F.logsigmoid(odds), bound=0.0)


def unsaturated_ctw(image: Tensor, yes: Tensor, no: Tensor, *, logit_scale: float = CLIP_LOGIT_SCALE) -> Tensor:
    """`ctw` in the order of the log-odds near 1 (see `unsaturated`); arguments as there."""
    logits, odds = _yes_and_no(image, yes, no, logit_scale)
    of_best = odds.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    return unsaturated(of_best.sigmoid(), F.logsigmoid(-of_best))


def unsaturated_atd(image: Tensor, yes: Tensor, no: Tensor, *, logit_scale: float = CLIP_LOGIT_SCALE) -> Tensor:
    """`atd` in the order of what remains to 1 near 1 (see `unsaturated`); arguments as there."""
    logits, odds = _yes_and_no(image, yes, no, logit_scale)
    remaining = (logits.log_softmax(-1) + F.logsigmoid(-odds)).logsumexp(-1)
    return unsaturated((odds.sigmoid() * logits.softmax(-1)).sum(-1), remaining)


def _yes_and_no(image: Tensor, yes: Tensor, no: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Logits of "yes", and the log-odds of "yes" against "no", [N, C] each."""
    image, yes, no = check.tensors(image=(image, "N d"), yes=(yes, "C d"), no=(no, "C d"))
    scale = check.positive("logit_scale", logit_scale)
    logits = scale * image @ yes.T
    return logits, logits - scale * image @ no.T


def _weighted(results: Tensor, weight: Tensor) -> Tensor:
    """[B, D] of [B, K, D] and [B, K]."""
    return (weight[..., None] * results).sum(1)


def _blend(x: Tensor, lam: Tensor, index: Tensor) -> Tensor:
    share = lam.view(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x[index]


def _indices(name: str, value: Any, rows: Tensor, count: int) -> Tensor:
    """Indices in [0, count), one per row, on the device of the rows."""
    if isinstance(value, Tensor) and value.device != rows.device:
        raise ValueError(f"{name} is on {value.device}, the other tensors are on {rows.device}: move it there.")
    return check.labels(name, value, len(rows), count)


def _within_unit(name: str, value: Tensor) -> None:
    low, high = value.detach().min().item(), value.detach().max().item()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1], got {low:.6g} to {high:.6g}.")


def _letters(value: Any, *first: str) -> str:
    """Dimension letters of a tensor of any rank that starts with the given ones."""
    rank = getattr(value, "ndim", len(first))
    return " ".join([*first, *(f"n{i}" for i in range(len(first), rank))])
