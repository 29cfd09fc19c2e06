"""Means of the k largest patch-to-class and class-to-patch probabilities: validation and choice of the backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor, is_grad_enabled

from ood_core import check
from ood_core.ops.topk_patch_softmax.reference import reference
from ood_core.ops.topk_patch_softmax.torch import chunked

__all__ = ["PatchSoftmax", "topk_patch_softmax"]

_BACKENDS = {"reference": reference, "torch": chunked}


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
    check.choice("backend", backend, (None, *_BACKENDS, "triton"))
    match_all = _choose(backend, [given for given in (local, text, negatives) if given is not None])
    matches = match_all(local, text, negatives, ks, temperature)
    return PatchSoftmax(*(match[:, 0] if isinstance(k, int) else match for match in matches))


def _choose(backend: str | None, tensors: list[Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    on_gpu = tensors[0].is_cuda  # true of HIP devices, too
    gradient = is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if backend is None:
        backend = "triton" if on_gpu and not gradient and find_spec("triton") else "torch"
    if backend != "triton":
        return _BACKENDS[backend]
    if not find_spec("triton"):
        raise ValueError("backend='triton' needs the package triton, which is not installed: use backend='torch'.")
    if gradient:
        raise ValueError("backend='triton' gives no gradients, but a tensor requires one: use backend='torch'.")
    # Imported late: only this backend needs Triton, whose import takes a while.
    from ood_core.ops.topk_patch_softmax.triton import compiled, tiled

    if compiled() and not on_gpu:
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA or HIP device, got {tensors[0].device}: move them, use "
            "backend='torch', or start Python with TRITON_INTERPRET=1 to interpret the kernels on any device."
        )
    return tiled
