# mypy: allow-untyped-defs
"""The class token's attention, a tile of an image's tokens per program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ood_mofe.ops.expert_dispatch.kernels import sizes
from ood_mofe.ops.expert_dispatch.kernels.normalised import attention_options, normalised_products, store_weighted


def attend(keys: Tensor, tokens: Tensor, scale: float, eps: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Per tile of tokens: sums [B, tiles, H, D] weighted by exp(logit - maximum), maxima and sums of these weights."""
    images, count, width = tokens.shape
    heads, tiles = keys.shape[1], triton.cdiv(count, sizes.TILE)
    parts = keys.new_empty(images, tiles, heads, width)
    tops, totals = keys.new_empty(2, images, tiles, heads)
    _attend[(tiles, images)](
        tokens, keys, parts, tops, totals, count, heads, width, scale, eps, **attention_options(heads, precision)
    )
    return parts, tops, totals


@triton.jit
def _attend(
    tokens,  # [B, T, D]
    keys,  # [B, H, D]
    parts,  # [B, tiles, H, D]
    tops,  # [B, tiles, H]
    totals,  # [B, tiles, H]
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
    logits = tl.where((token < T)[None, :], scale * logits, float("-inf"))
    top = tl.max(logits, 1)
    weights = tl.exp(logits - top[:, None])
    at = (image * tl.num_programs(0) + tl.program_id(0)) * H + head
    tl.store(tops + at, top, head < H)
    tl.store(totals + at, tl.sum(weights, 1), head < H)
    store_weighted(parts + at[:, None] * D, weights, token_at, token_in, mean, rstd, head_in, D, DEPTH, PRECISION)
