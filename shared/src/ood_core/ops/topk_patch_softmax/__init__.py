"""Means of the k largest patch-to-class and class-to-patch probabilities: validation and choice of the backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ood_core import _check
from ood_core.ops.topk_patch_softmax.reference import reference
from ood_core.ops.topk_patch_softmax.torch import chunked

__all__ = ["PatchSoftmax", "topk_patch_softmax"]

_BACKENDS = {"reference": reference, "torch": chunked}


class PatchSoftmax(NamedTuple):
    """Both matches of every image, each [N].

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
    k: int,
    temperature: float = 1.0,
    backend: str | None = None,
) -> PatchSoftmax:
    """Match patches with classes in both directions.

    Args:
        local: patch features [N, P, d], unit norm.
        text: class features [C, d], unit norm.
        negatives: [M, d], unit norm, or None; they enter the denominators of `image_to_text` only.
        k: number of (patch, class) entries averaged, 1 to P * C.
        temperature: divides the cosines, above 0.
        backend: "reference" (plain), "torch" (chunked, exact) or None to choose.

    Returns:
        `PatchSoftmax(image_to_text [N], text_to_image [N])`; the second includes the factor P / C.

    Raises:
        TypeError: not floating-point tensors, or `k` no integer.
        ValueError: shapes that do not fit, NaN, `k` out of range, `temperature` not above 0, unknown backend.

    Source: S_i2t and S_t2i of Chen et al., AAAI 2026, Eq. 4 and 12.

    Example:
        >>> import torch
        >>> out = topk_patch_softmax(torch.eye(2)[None], torch.eye(2), k=4)
        >>> out.image_to_text, out.text_to_image
        (tensor([0.5000]), tensor([0.5000]))
    """
    local, text, negatives = _check.tensors(local=(local, "N P d"), text=(text, "C d"), negatives=(negatives, "M d"))
    _check.integer("k", k, 1, local.shape[1] * len(text), "patches x classes")
    _check.positive("temperature", temperature)
    _check.choice("backend", backend, (None, *_BACKENDS))
    return PatchSoftmax(*_BACKENDS[backend or "torch"](local, text, negatives, k, temperature))
