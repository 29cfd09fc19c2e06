"""The pyramid of tiles, its adapter and its fusion across scales as pure functions on tensors.

float64 stays float64, everything else is computed in float32. B images, n x n middle and 2n x 2n fine tiles
in row-major order, d width. Equations: Lai et al., MICCAI 2025.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from ood_core import _check
from torch import Tensor

__all__ = ["adapt", "entropy", "fuse", "parent_index", "split_pyramid"]


def split_pyramid(images: Tensor, n: int) -> Tensor:
    """Each image as a whole, as n x n and as 2n x 2n tiles, every tile of the size of the image.

    The image is enlarged n and 2n times (bicubic, a = -0.75, pixel centres aligned, no clamping) and cut.

    Args:
        images: [B, 3, S, S].
        n: partitions of the middle scale, at least 1.

    Returns:
        [B, 1 + 5 n^2, 3, S, S] in the order whole, middle tiles, fine tiles, each row-major.

    Raises:
        TypeError: not a floating-point tensor, or `n` no integer.
        ValueError: not square images of 3 channels, NaN, or `n` below 1.

    Source: the paper's hierarchical partition; the interpolation is ours, the paper names none.

    Example:
        >>> split_pyramid(torch.zeros(1, 3, 8, 8), 2).shape
        torch.Size([1, 21, 3, 8, 8])
    """
    (images,) = _check.tensors(images=(images, "B C S S"))
    if images.shape[1] != 3:
        raise ValueError(f"images must have 3 channels, got shape {list(images.shape)}.")
    _partitions(n)
    return torch.cat([images[:, None], _tiles(images, n), _tiles(images, 2 * n)], dim=1)


def _tiles(images: Tensor, count: int) -> Tensor:
    """Tiles [B, count^2, 3, S, S] of the images enlarged `count` times."""
    size = images.shape[-1]
    large = F.interpolate(images, scale_factor=count, mode="bicubic", align_corners=False)
    tiles = large.unfold(2, size, size).unfold(3, size, size)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def _partitions(n: int) -> int:
    return _check.integer("n", n, 1, 2**15)


def parent_index(n: int) -> Tensor:
    """The middle tile that holds each fine tile.

    Args:
        n: partitions of the middle scale, at least 1.

    Returns:
        int64 [4 n^2] in [0, n^2); each value occurs four times.

    Raises:
        TypeError: `n` no integer.
        ValueError: `n` below 1.

    Source: j* of Eq. 1.

    Example:
        >>> parent_index(2).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    """
    half = torch.arange(2 * _partitions(n)) // 2
    return (half[:, None] * n + half).flatten()


def adapt(v: Tensor, weight: Tensor) -> Tensor:
    """The residual adapter: relu(v W) + v.

    Args:
        v: embeddings [..., d].
        weight: [d, d]; at exactly 0 its gradient is 0 everywhere, so training has to start elsewhere.

    Returns:
        [..., d].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, or NaN.

    Source: the paper's visual adapter, one for all scales.

    Example:
        >>> adapt(torch.tensor([[1.0, -2.0]]), torch.eye(2))
        tensor([[ 2., -2.]])
    """
    v, weight = _check.tensors(v=(v, _rows_of(v, "d")), weight=(weight, "d d"))
    return torch.relu(v @ weight) + v


def fuse(u0: Tensor, u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Add coarse context to finer embeddings, weighted by the cosine between them.

    Args:
        u0: whole images [B, d].
        u1: middle tiles [B, n^2, d].
        u2: fine tiles [B, 4 n^2, d].

    Returns:
        (h1 [B, n^2, d], h2 [B, 4 n^2, d]): u1 with its image, u2 with its fused parent; a zero vector has
        cosine 0.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that do not fit, numbers of tiles that are no pyramid, or NaN.

    Source: Eq. 1: h1_i = u1_i + cos(u1_i, u0) u0, h2_j = u2_j + cos(u2_j, h1_j*) h1_j*.

    Example:
        >>> h1, h2 = fuse(torch.ones(1, 2), torch.ones(1, 1, 2), torch.ones(1, 4, 2))
        >>> h1[0, 0].round(decimals=4), h2[0, 0].round(decimals=4)
        (tensor([2., 2.]), tensor([3., 3.]))
    """
    u0, u1, u2 = _check.tensors(u0=(u0, "B d"), u1=(u1, "B N1 d"), u2=(u2, "B N2 d"))
    n = isqrt(u1.shape[1])
    if n * n != u1.shape[1] or u2.shape[1] != 4 * n * n:
        raise ValueError(f"u1 and u2 must hold n^2 and 4 n^2 tiles per image, got {u1.shape[1]} and {u2.shape[1]}.")
    h1 = _with_context(u1, u0[:, None])
    h2 = _with_context(u2, h1[:, parent_index(n).to(h1.device)])
    return h1, h2


def _with_context(x: Tensor, context: Tensor) -> Tensor:
    cosine = (F.normalize(x, dim=-1) * F.normalize(context, dim=-1)).sum(-1, keepdim=True)
    return x + cosine * context


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy of class probabilities in nats: -sum_c p_c log p_c.

    Args:
        p: [..., C] in [0, 1].

    Returns:
        [...] in [0, log C]; its gradient is finite at p = 0, too.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: empty, NaN, or values outside [0, 1].

    Source: H of the paper's patch filter, entropy gain and Eq. 5.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [0.0, 1.0]])).round(decimals=4).abs()
        tensor([0.6931, 0.0000])
    """
    (p,) = _check.tensors(p=(p, _rows_of(p, "C")))
    low, high = p.detach().min().item(), p.detach().max().item()
    if low < 0 or high > 1 + 1e-5:
        raise ValueError(f"p must lie in [0, 1], got {low:.6g} to {high:.6g}: give probabilities, not logits.")
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def _rows_of(value: Any, last: str) -> str:
    """Dimension letters of a tensor with any number of leading dimensions."""
    leading = [f"n{i}" for i in range(getattr(value, "ndim", 1) - 1)]
    return " ".join([*leading, last])
