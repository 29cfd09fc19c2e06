# mypy: allow-untyped-defs
"""Sums of every expert's rows, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ood_mofe.ops.expert_dispatch.kernels import sizes
from ood_mofe.ops.expert_dispatch.kernels.plan import Plan, row_of


def row_sums(values: Tensor, plan: Plan) -> Tensor:
    """Sums [E, N] of each expert's rows in [B, T, N]."""
    _, tokens, columns = values.shape
    experts = len(plan.offsets) - 1
    out = values.new_empty(experts, columns)
    _row_sums[(triton.cdiv(columns, sizes.COLUMNS), experts)](
        values,
        out,
        plan.order,
        plan.offsets,
        tokens,
        columns,
        ROWS=sizes.SUMMED,
        COLUMNS=sizes.COLUMNS,
        **sizes.OPTIONS,
    )
    return out


@triton.jit
def _row_sums(
    values,  # [R, N]
    out,  # [E, N]
    order,
    offsets,
    T,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(offsets + expert) * T
    stop = tl.load(offsets + expert + 1) * T
    total = tl.full((COLUMNS,), 0, tl.float32)
    for start in range(begin, stop, ROWS):
        position = start + tl.arange(0, ROWS)
        at = row_of(order, position, stop, T)[:, None] * N + column[None, :]
        total += tl.sum(tl.load(values + at, (position < stop)[:, None] & (column < N)[None, :], 0.0), 0)
    tl.store(out + expert * N + column, total, column < N)
