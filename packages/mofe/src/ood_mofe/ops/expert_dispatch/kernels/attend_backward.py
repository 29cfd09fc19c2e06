# mypy: allow-untyped-defs
"""The backward pass of the class token's attention: the same tiles again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ood_mofe.ops.expert_dispatch.kernels import sizes
from ood_mofe.ops.expert_dispatch.kernels.normalised import attention_options, normalised_products, store_weighted


def attend_backward(
    keys: Tensor,
    tokens: Tensor,
    d: Tensor,
    top: Tensor,
    total: Tensor,
    average: Tensor,
    scale: float,
    eps: float,
    precision: str,
) -> Tensor:
    """The keys' gradient, a part per tile of tokens [B, tiles, H, D]."""
    images, count, width = tokens.shape
    heads, tiles = keys.shape[1], triton.cdiv(count, sizes.TILE)
    parts = keys.new_empty(images, tiles, heads, width)
    _attend_backward[(tiles, images)](
        tokens,
        keys,
        d,
        parts,
        top,
        total,
        average,
        count,
        heads,
        width,
        scale,
        eps,
        **attention_options(heads, precision),
    )
    return parts


@triton.jit
def _attend_backward(
    tokens,  # [B, T, D]
    keys,  # [B, H, D]
    gradient,  # [B, H, D]: of the weighted means
    parts,  # [B, tiles, H, D]
    top,  # [B, H]: the largest logit
    total,  # [B, H]: sum of exp(logit - top)
    average,  # [B, H]: gradient . weighted mean
    T,
    H,
    D,
    scale,
    eps,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.arange(0, HEADS)
    token_in = (token < T)[:, None]
    head_in = (head < H)[:, None]
    token_at = tokens + (image * T + token)[:, None] * D
    vector = (image * H + head)[:, None] * D
    logits, mean, rstd = normalised_products(
        token_at, token_in, keys + vector, head_in, D, eps, HEADS, TILE, DEPTH, PRECISION
    )
    slopes, _, _ = normalised_products(
        token_at, token_in, gradient + vector, head_in, D, eps, HEADS, TILE, DEPTH, PRECISION
    )
    row = image * H + head
    peak = tl.load(top + row, head < H, 0.0)
    share = 1 / tl.load(total + row, head < H, 1.0)
    centre = tl.load(average + row, head < H, 0.0)
    weights = tl.exp(scale * logits - peak[:, None]) * share[:, None] * (slopes - centre[:, None])
    weights = tl.where(head_in & (token < T)[None, :], scale * weights, 0.0)
    at = ((image * tl.num_programs(0) + tl.program_id(0)) * H + head)[:, None] * D
    store_weighted(parts + at, weights, token_at, token_in, mean, rstd, head_in, D, DEPTH, PRECISION)
