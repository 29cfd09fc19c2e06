# mypy: allow-untyped-defs
"""Every image's rows through the linear map of its expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ood_mofe.ops.expert_dispatch.kernels import sizes
from ood_mofe.ops.expert_dispatch.kernels.plan import Plan, row_of


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The rows, and if they are to be kept, those before activation and gain."""
    images, tokens, groups, depth = x.shape
    experts, _, columns, _ = weight.shape
    out = x.new_empty(images, tokens, groups, columns)
    before = torch.empty_like(out) if keep else None
    _grouped_linear[(triton.cdiv(columns, sizes.COLUMNS), len(plan.tile_expert), groups)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        None if gain is None else gain.contiguous(),
        residual,
        before,
        out,
        plan.order,
        plan.offsets,
        plan.tile_expert,
        plan.tile_row,
        experts,
        tokens,
        groups,
        columns,
        depth,
        *weight.stride(),
        ACTIVATION=activation,
        COLUMNS=sizes.COLUMNS,
        DEPTH=sizes.DEPTH,
        PRECISION=plan.precision,
        **linear_options(plan.height),
    )
    return out, before


def linear_options(height: int) -> dict[str, object]:
    """How the kernel is compiled for tiles of this many rows."""
    # 64 x 64 sums in full float32 need more registers than four warps have.
    return {"ROWS": height, **sizes.OPTIONS, "num_warps": 4 if height == sizes.FEW else 8}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(0.7071067811865476 * x))
    if ACTIVATION == "quick_gelu":
        x = x / (1 + tl.exp(-1.702 * x))
    return x


@triton.jit
def _grouped_linear(
    x,  # [R, G, K]
    weight,  # [E, G, N, K]
    bias,  # [E, G, N] or None
    gain,  # [E, N] or None
    residual,  # [R, G, N] or None
    before,  # [R, G, N] or None: x @ weight + bias
    out,  # [R, G, N]: residual + gain * activation(before)
    order,
    offsets,
    tile_expert,
    tile_row,
    E,
    T,
    G,
    N,
    K,
    weight_expert,
    weight_group,
    weight_n,
    weight_k,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert >= E:
        return
    stop = tl.load(offsets + expert + 1) * T
    # Columns run fastest: programs that run together share their rows, and an expert's weights stay in the cache.
    group = tl.program_id(2)
    position = tl.load(tile_row + tl.program_id(1)) + tl.arange(0, ROWS)
    row_in = position < stop
    row = row_of(order, position, stop, T) * G + group
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_in = column < N
    depth = tl.arange(0, DEPTH)
    x_at = x + row[:, None] * K + depth[None, :]
    matrix = weight + expert.to(tl.int64) * weight_expert + group * weight_group
    weight_at = matrix + column[None, :] * weight_n + depth[:, None] * weight_k
    y = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for start in range(0, K, DEPTH):
        a = tl.load(x_at + start, row_in[:, None] & (start + depth[None, :] < K), 0.0)
        b = tl.load(weight_at + start * weight_k, column_in[None, :] & (start + depth[:, None] < K), 0.0)
        y = tl.dot(a, b.to(tl.float32), y, input_precision=PRECISION)

    if bias is not None:
        y += tl.load(bias + (expert * G + group) * N + column, column_in, 0.0).to(tl.float32)[None, :]
    at = row[:, None] * N + column[None, :]
    inside = row_in[:, None] & column_in[None, :]
    if before is not None:
        tl.store(before + at, y, inside)
    y = _activate(y, ACTIVATION)
    if gain is not None:
        y *= tl.load(gain + expert * N + column, column_in, 0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, y, inside)
