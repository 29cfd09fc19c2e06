"""Means of the k largest patch-to-class and class-to-patch probabilities: the arguments that every backend gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ood_core import check
from ood_core.ops.backend import implementation

__all__ = ["PatchSoftmax", "topk_patch_softmax"]


class PatchSoftmax(NamedTuple):
    """Both matches of every image, each [N], or [N, K] for K values of k.

    Attributes:
        image_to_text: mean of the k largest softmax probabilities over classes (and negatives) per patch.
        text_to_image: mean of the k largest softmax probabilities over patches per class, times P / C.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def topk_patch_softmax(
    local: Tensor,
    text: Tensor,
    negatives: Tensor | None = None,
    *,
    k: int | Sequence[int],
    temperature: float = 1.0,
    backend: str | None = None,
) -> PatchSoftmax:
    """Match patches with classes in both directions.

    Args:
        local: patch features [N, P, d], unit norm.
        text: class features [C, d], unit norm.
        negatives: [M, d], unit norm, or None; they enter the denominators of `image_to_text` only.
        k: number of (patch, class) entries averaged, 1 to P * C; several numbers cost hardly more than the largest.
        temperature: divides the cosines, above 0.
        backend: "reference" (plain), "torch" (chunked, exact), "triton" (kernels for CUDA and HIP devices, exact, no
            gradients) or None: "triton" where it can run, otherwise "torch".

    Returns:
        `PatchSoftmax(image_to_text [N], text_to_image [N])`; the second includes the factor P / C. [N, K] each if
        `k` is a sequence of K numbers.

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, `k` out of range, `temperature` not above 0, unknown backend,
            or "triton" where it cannot run.

    Source: S_i2t and S_t2i of Chen et al., AAAI 2026, Eq. 4 and 12.

    Example:
        >>> import torch
        >>> out = topk_patch_softmax(torch.eye(2)[None], torch.eye(2), k=4)
        >>> out.image_to_text, out.text_to_image
        (tensor([0.5000]), tensor([0.5000]))
    """
    local, text, negatives = check.tensors(local=(local, "N P d"), text=(text, "C d"), negatives=(negatives, "M d"))
    ks = list(k) if isinstance(k, Sequence) else [k]
    if not ks:
        raise ValueError("k=[] is empty: give at least one number.")
    for one in ks:
        check.integer("k", one, 1, local.shape[1] * len(text), "patches x classes")
    check.positive("temperature", temperature)
    given = (tensor for tensor in (local, text, negatives) if tensor is not None)
    form = implementation(__name__, backend, *given, gradients=False)
    matches = form.match(local, text, negatives, ks, temperature)
    return PatchSoftmax(*(match[:, 0] if isinstance(k, int) else match for match in matches))
