# mypy: allow-untyped-defs
"""What both passes of the attention do with tokens that are normalised on the fly."""

from __future__ import annotations

import triton
import triton.language as tl

from ood_mofe.ops.expert_dispatch.kernels import sizes


def attention_options(heads: int, precision: str) -> dict[str, object]:
    """How both kernels are compiled."""
    # Products on matrix units have at least 16 rows.
    padded = max(16, triton.next_power_of_2(heads))
    return {"HEADS": padded, "TILE": sizes.TILE, "DEPTH": sizes.DEPTH, "PRECISION": precision, **sizes.OPTIONS}


@triton.jit
def normalised_products(
    token_at,
    token_in,
    vector_at,
    head_in,
    D,
    eps,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products [HEADS, TILE] of vectors with normalised tokens, and the tokens' means and reciprocal deviations."""
    depth = tl.arange(0, DEPTH)
    mean = tl.full((TILE,), 0, tl.float32)
    spread = tl.full((TILE,), 0, tl.float32)
    sums = tl.full((HEADS,), 0, tl.float32)
    products = tl.full((HEADS, TILE), 0, tl.float32)
    for start in range(0, D, DEPTH):
        inside = (start + depth < D)[None, :]
        z = tl.load(token_at + start + depth[None, :], token_in & inside, 0.0).to(tl.float32)
        v = tl.load(vector_at + start + depth[None, :], head_in & inside, 0.0)
        products = tl.dot(v, tl.trans(z), products, input_precision=PRECISION)
        sums += tl.sum(v, 1)
        count = tl.minimum(D - start, DEPTH).to(tl.float32)
        chunk = tl.sum(z, 1) / count
        away = tl.where(inside, z - chunk[:, None], 0.0)
        share = count / (start + count)
        spread += tl.sum(away * away, 1) + (chunk - mean) * (chunk - mean) * (start * share)
        mean += (chunk - mean) * share
    rstd = tl.rsqrt(spread / D + eps)
    return (products - sums[:, None] * mean[None, :]) * rstd[None, :], mean, rstd


@triton.jit
def store_weighted(
    out_at, weights, token_at, token_in, mean, rstd, head_in, D, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):
    """Store the sum of the normalised tokens of a tile, weighted for each head."""
    depth = tl.arange(0, DEPTH)
    for start in range(0, D, DEPTH):
        inside = (start + depth < D)[None, :]
        z = tl.load(token_at + start + depth[None, :], token_in & inside, 0.0).to(tl.float32)
        normalised = (z - mean[:, None]) * rstd[:, None]
        part = tl.dot(weights, normalised, input_precision=PRECISION)
        tl.store(out_at + start + depth[None, :], part, head_in & inside)
