"""S-MCM and parts of intra-image mining as pure functions on tensors; higher score = more in-distribution.

`image`, `local`, `global_text`, `local_text` and `negatives` are unit-norm; logits are cosines times the model's logit
scale. float64 stays float64, everything else is computed in float32. N images, P patches, C classes, M negatives,
d width. Equations: Chen et al., AAAI 2026.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ood_core import check
from ood_core.functional import mcm, released_image_to_text
from ood_core.ops import topk_patch_softmax
from torch import Tensor

__all__ = ["diversity_loss", "id_logits", "negative_loss", "positive_loss", "s_mcm"]


def s_mcm(
    image: Tensor,
    local: Tensor,
    global_text: Tensor,
    local_text: Tensor,
    negatives: Tensor | None = None,
    *,
    k: int = 50,
    temperature: float = 1.0,
    alpha: float = 1.0,
    form: str = "paper",
) -> Tensor:
    """Symmetric MCM: `mcm` plus the best patch-to-class and `alpha` times the best class-to-patch matches.

    Args:
        image: [N, d] unit norm.
        local: [N, P, d] unit norm.
        global_text: [C, d] unit norm, compared with `image`.
        local_text: [C, d] unit norm, compared with `local`.
        negatives: [M, d] unit norm, or None (S-MCM*); they enter the patch-to-class denominators only.
        k: number of (patch, class) entries averaged, 1 to P * C.
        temperature: divides the cosines, above 0.
        alpha: factor of the class-to-patch term, at least 0; 0 gives R-MCM.
        form: "paper": one softmax; "released": the released code's double exponential when negatives are
            given.

    Returns:
        [N].

    Raises:
        TypeError: not floating-point tensors, `k` no integer, `alpha` no number.
        ValueError: shapes that do not fit, NaN, `k`, `temperature` or `alpha` out of range, unknown `form`.

    Source: Eq. 3, 4 and 12.

    Example:
        >>> import torch
        >>> s_mcm(torch.eye(2)[:1], torch.eye(2)[None], torch.eye(2), torch.eye(2), k=2).round(decimals=4)
        tensor([2.1932])
    """
    image, local, global_text, local_text, negatives = check.tensors(
        image=(image, "N d"),
        local=(local, "N P d"),
        global_text=(global_text, "C d"),
        local_text=(local_text, "C d"),
        negatives=(negatives, "M d"),
    )
    check.choice("form", form, ("paper", "released"))
    check.factor("alpha", alpha)
    match = topk_patch_softmax(local, local_text, negatives, k=k, temperature=temperature)
    image_to_text = match.image_to_text
    if form == "released" and negatives is not None:
        image_to_text = released_image_to_text(local, local_text, negatives, k, temperature)
    return mcm(image, global_text, temperature=temperature) + image_to_text + alpha * match.text_to_image


def id_logits(
    image: Tensor, local: Tensor, global_text: Tensor, local_text: Tensor, *, k: int, temperature: float = 1.0
) -> Tensor:
    """Class logits for ID classification: global match times the mean of each class's k best patch matches.

    Args:
        image: [N, d] unit norm.
        local: [N, P, d] unit norm.
        global_text: [C, d] unit norm, compared with `image`.
        local_text: [C, d] unit norm, compared with `local`.
        k: patches averaged per class, 1 to P.
        temperature: divides the cosines of the patches, above 0.

    Returns:
        [N, C], above 0; the predicted class is the argmax.

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, `k` or `temperature` out of range.

    Source: the released code's `test()`: exp(g . tG_c) * mean of the k largest over patches h of
    exp(v_h . tL_c / T).

    Example:
        >>> import torch
        >>> id_logits(torch.eye(2)[:1], torch.eye(2)[None], torch.eye(2), torch.eye(2), k=1).round(decimals=4)
        tensor([[7.3891, 2.7183]])
    """
    image, local, global_text, local_text = check.tensors(
        image=(image, "N d"),
        local=(local, "N P d"),
        global_text=(global_text, "C d"),
        local_text=(local_text, "C d"),
    )
    check.integer("k", k, 1, local.shape[1], "patches")
    check.positive("temperature", temperature)
    best = (local @ local_text.T / temperature).topk(k, dim=1).values
    return (image @ global_text.T).exp() * best.exp().mean(1)


def positive_loss(
    local_logits: Tensor,
    negative_logits: Tensor | None,
    labels: Tensor,
    *,
    k: int,
    hard_negative_mining: bool = True,
) -> Tensor:
    """Cross-entropy of the label over best patches: its k best against those of all classes and negatives.

    Args:
        local_logits: patches against classes [B, P, C], logit scale included.
        negative_logits: patches against negative prompts [B, P, M], or None (or M = 0) for none.
        labels: class numbers, int64 [B].
        k: patches per class, 1 to P.
        hard_negative_mining: every other class and every negative is read at its own k best patches; False
            reads them at the label's.

    Returns:
        Scalar, at least 0; mean over the batch.

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, `k` or a label out of range.

    Source: Eq. 8.

    Example:
        >>> import torch
        >>> positive_loss(torch.zeros(1, 4, 2), None, torch.tensor([0]), k=2).round(decimals=4)
        tensor(0.6931)
    """
    classes, negatives, labels = _loss_inputs(local_logits, negative_logits, labels)
    check.integer("k", k, 1, classes.shape[1], "patches")
    if hard_negative_mining:
        classes, negatives = (logits.topk(k, dim=1).values for logits in (classes, negatives))
    else:
        patches = _of_label(classes, labels).topk(k, dim=1).indices
        classes, negatives = _at(classes, patches), _at(negatives, patches)
    per_class, per_negative = classes.logsumexp(1), negatives.logsumexp(1)
    label = F.one_hot(labels, per_class.shape[1]).bool()
    rest = torch.cat([per_class.masked_fill(label, -torch.inf), per_negative], 1).logsumexp(1)
    return _softplus(rest - per_class[label]).mean()


def negative_loss(
    local_logits: Tensor,
    negative_logits: Tensor,
    labels: Tensor,
    *,
    k: int,
    form: str = "paper",
    region: str = "next",
) -> Tensor:
    """Cross-entropy of the negative prompts over the hard negative patches, those behind the label's k best.

    Args:
        local_logits: patches against classes [B, P, C], logit scale included.
        negative_logits: patches against negative prompts [B, P, M], M at least 1.
        labels: class numbers, int64 [B].
        k: number of positive patches, 1 to P / 2 (`region="all"`: to P - 1).
        form: "paper": classes are read at the label's hard negative patches; "released": every class at its
            own patches of those ranks.
        region: "next": ranks k + 1 to 2k; "all": ranks k + 1 to P.

    Returns:
        Scalar, at least 0; mean over the batch.

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, no negatives, `k` or a label out of range, unknown `form` or
            `region`.

    Source: Eq. 9, with the patches of Eq. 6 and 7.

    Example:
        >>> import torch
        >>> negative_loss(torch.zeros(1, 4, 1), torch.zeros(1, 4, 3), torch.tensor([0]), k=2).round(decimals=4)
        tensor(0.2877)
    """
    classes, negatives, labels = _loss_inputs(local_logits, negative_logits, labels)
    check.choice("form", form, ("paper", "released"))
    check.choice("region", region, ("next", "all"))
    if not negatives.shape[2]:
        raise ValueError("negative_loss needs at least one negative prompt, got none: leave this loss out.")
    patches = classes.shape[1]
    most, last = (patches // 2, 2 * k) if region == "next" else (patches - 1, patches)
    check.integer("k", k, 1, most, f"the hard negatives are patches behind the k best of {patches}")
    hard = _of_label(classes, labels).topk(last, dim=1).indices[:, k:]
    in_classes = _at(classes, hard) if form == "paper" else classes.topk(last, dim=1).values[:, k:]
    in_negatives = _at(negatives, hard)
    return _softplus(in_classes.flatten(1).logsumexp(1) - in_negatives.flatten(1).logsumexp(1)).mean()


def diversity_loss(text: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Mean cosine between different class texts plus mean cosine between different negatives.

    Args:
        text: [C, d] of any norm.
        negatives: [M, d] of any norm, or None (classes only).

    Returns:
        Scalar in [-2, 2]; a single class or a single negative contributes 0.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, or NaN.

    Source: Eq. 10, over pairs i < j (the released code also counts i = j: 1/(C-1) + 1/(M-1) more, same
    gradient).

    Example:
        >>> import torch
        >>> diversity_loss(torch.eye(3), torch.ones(2, 3)).round(decimals=4)
        tensor(1.)
    """
    text, negatives = check.tensors(text=(text, "C d"), negatives=(negatives, "M d"))
    parts = [_mean_pair_cosine(part) for part in (text, negatives) if part is not None]
    return sum(parts[1:], parts[0])


def _loss_inputs(local_logits: Tensor, negative_logits: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked logits; no negatives become [B, P, 0]."""
    if negative_logits is None or negative_logits.shape[-1:] == (0,):
        (classes,) = check.tensors(local_logits=(local_logits, "B P C"))
        negatives = classes[..., :0]
    else:
        classes, negatives = check.tensors(
            local_logits=(local_logits, "B P C"), negative_logits=(negative_logits, "B P M")
        )
    return classes, negatives, check.labels("labels", labels, len(classes), classes.shape[2])


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own is linear above 20, an error of 2e-9 in values and gradients."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, P] of the label's class from [B, P, C]."""
    return logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)


def _at(logits: Tensor, patches: Tensor) -> Tensor:
    """[B, k, C] of the given patches [B, k] from [B, P, C]."""
    return logits.gather(1, patches[..., None].expand(-1, -1, logits.shape[2]))


def _mean_pair_cosine(x: Tensor) -> Tensor:
    """Mean over i < j of cos(x_i, x_j) = (|sum_i f_i|^2 - sum_i |f_i|^2) / (n (n - 1)), f_i = x_i / |x_i|."""
    unit = F.normalize(x, dim=-1)
    twice = unit.sum(0).square().sum() - unit.square().sum()
    return twice / max(1, len(x) * (len(x) - 1))
