"""S-MCM and parts of intra-image mining as pure functions on tensors; higher score = more in-distribution.

`image`, `local`, `global_text`, `local_text` and `negatives` are unit-norm. float64 stays float64, everything
else is computed in float32. N images, P patches, C classes, M negatives, d width. Equations: Chen et al.,
AAAI 2026.
"""

from __future__ import annotations

import torch.nn.functional as F
from ood_core import _check
from ood_core.functional import _released_image_to_text, mcm
from ood_core.ops import topk_patch_softmax
from torch import Tensor

__all__ = ["diversity_loss", "id_logits", "s_mcm"]


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
    image, local, global_text, local_text, negatives = _check.tensors(
        image=(image, "N d"),
        local=(local, "N P d"),
        global_text=(global_text, "C d"),
        local_text=(local_text, "C d"),
        negatives=(negatives, "M d"),
    )
    _check.choice("form", form, ("paper", "released"))
    check_alpha(alpha)
    match = topk_patch_softmax(local, local_text, negatives, k=k, temperature=temperature)
    image_to_text = match.image_to_text
    if form == "released" and negatives is not None:
        image_to_text = _released_image_to_text(local, local_text, negatives, k, temperature)
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
    image, local, global_text, local_text = _check.tensors(
        image=(image, "N d"),
        local=(local, "N P d"),
        global_text=(global_text, "C d"),
        local_text=(local_text, "C d"),
    )
    _check.integer("k", k, 1, local.shape[1], "patches")
    _check.positive("temperature", temperature)
    best = (local @ local_text.T / temperature).topk(k, dim=1).values
    return (image @ global_text.T).exp() * best.exp().mean(1)


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
    text, negatives = _check.tensors(text=(text, "C d"), negatives=(negatives, "M d"))
    parts = [_mean_pair_cosine(part) for part in (text, negatives) if part is not None]
    return sum(parts[1:], parts[0])


def _mean_pair_cosine(x: Tensor) -> Tensor:
    """Mean over i < j of cos(x_i, x_j) = (|sum_i f_i|^2 - sum_i |f_i|^2) / (n (n - 1)), f_i = x_i / |x_i|."""
    unit = F.normalize(x, dim=-1)
    twice = unit.sum(0).square().sum() - unit.square().sum()
    return twice / max(1, len(x) * (len(x) - 1))


def check_alpha(alpha: float) -> float:
    """Check the factor of the class-to-patch term: a finite number, at least 0.

    Raises:
        TypeError: not a number.
        ValueError: negative, infinite or NaN.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha must be a number, got {alpha!r}.")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be a finite number, at least 0.")
    return float(alpha)
