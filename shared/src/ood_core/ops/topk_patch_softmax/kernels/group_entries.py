# mypy: allow-untyped-defs
"""The entries of the groups that were kept, multiplied again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ood_core.ops.topk_patch_softmax.kernels import sizes


def group_entries(rows: Tensor, columns: Tensor, groups: Tensor, normaliser: Tensor, scale: float) -> Tensor:
    """Entries [N, k, TILE] of the groups [N, k]; those behind the last column are -inf."""
    images, most = groups.shape
    row_count, column_count = rows.shape[1], columns.shape[1]
    entries = normaliser.new_empty(images, most, sizes.TILE)
    _group_entries[(images * most,)](
        rows,
        columns,
        groups,
        normaliser,
        entries,
        rows.stride(0) if len(rows) > 1 else 0,
        columns.stride(0) if len(columns) > 1 else 0,
        row_count,
        column_count,
        rows.shape[2],
        most,
        scale,
        TILE=sizes.TILE,
        DEPTH=sizes.DEPTH,
        **sizes.OPTIONS,
    )
    return entries


@triton.jit
def _group_entries(
    rows,  # [N or 1, R, d]
    columns,  # [N or 1, S, d]
    groups,  # [N, k]: tile * R + row
    normaliser,  # [N, R]
    entries,  # [N, k, TILE]: scale * row . column - normaliser, -inf beyond S
    row_stride,
    column_stride,
    R,
    S,
    d,
    k,
    scale,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // k
    group = tl.load(groups + program)
    row = group % R
    column = group // R * TILE + tl.arange(0, TILE)
    column_in = column < S

    depth = tl.arange(0, DEPTH)
    row_at = rows + image * row_stride + row * d + depth
    column_at = columns + image * column_stride + column[:, None] * d + depth[None, :]
    products = tl.zeros((TILE, DEPTH), tl.float32)
    for start in range(0, d, DEPTH):
        a = tl.load(row_at + start, start + depth < d, 0.0)
        b = tl.load(column_at + start, column_in[:, None] & (start + depth[None, :] < d), 0.0)
        products += a[None, :] * b
    found = scale * tl.sum(products, 1) - tl.load(normaliser + image * R + row)
    tl.store(entries + program * TILE + tl.arange(0, TILE), tl.where(column_in, found, float("-inf")))
