# mypy: allow-untyped-defs
"""The gradient of every expert's weights, exactly zero for one without rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ood_mofe.ops.expert_dispatch.kernels import sizes
from ood_mofe.ops.expert_dispatch.kernels.plan import Plan, row_of


def weight_gradient(x: Tensor, d: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """x.T @ d over each expert's rows, in the shape of `weight`."""
    _, tokens, groups, depth = x.shape
    columns = d.shape[3]
    out = torch.empty_like(weight, dtype=torch.float32)
    _weight_gradient[(triton.cdiv(depth, sizes.COLUMNS), triton.cdiv(columns, sizes.COLUMNS), len(weight) * groups)](
        x,
        d,
        out,
        plan.order,
        plan.offsets,
        tokens,
        groups,
        columns,
        depth,
        *out.stride(),
        ROWS=sizes.SUMMED,
        COLUMNS=sizes.COLUMNS,
        PRECISION=plan.precision,
        **sizes.OPTIONS,
    )
    return out


@triton.jit
def _weight_gradient(
    x,  # [R, G, K]
    y,  # [R, G, N]: gradient behind the linear map
    out,  # [E, G, N, K]
    order,
    offsets,
    T,
    G,
    N,
    K,
    out_expert,
    out_group,
    out_n,
    out_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(2) // G
    group = tl.program_id(2) % G
    begin = tl.load(offsets + expert) * T
    stop = tl.load(offsets + expert + 1) * T
    total = tl.full((COLUMNS, COLUMNS), 0, tl.float32)
    for start in range(begin, stop, ROWS):
        position = start + tl.arange(0, ROWS)
        row = row_of(order, position, stop, T) * G + group
        row_in = position < stop
        a = tl.load(y + row[None, :] * N + n[:, None], row_in[None, :] & (n[:, None] < N), 0.0)
        b = tl.load(x + row[:, None] * K + k[None, :], row_in[:, None] & (k[None, :] < K), 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = out + expert.to(tl.int64) * out_expert + group * out_group
    at = at + n[:, None] * out_n + k[None, :] * out_k
    tl.store(at, total, (n[:, None] < N) & (k[None, :] < K))
