# mypy: allow-untyped-defs
"""Every tile's maxima and sums of exponentials, in both directions: nearly all of the work."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ood_core.ops.topk_patch_softmax.kernels import sizes


def tile_sums(local: Tensor, columns: Tensor, classes: int, scale: float) -> tuple[Tensor, Tensor]:
    """Maxima and sums of exponentials: [2, N, column tiles, P] over columns, [2, N, patch tiles, C] over patches."""
    images, patches, width = local.shape
    negatives = len(columns) - classes
    patch_tiles = triton.cdiv(patches, sizes.TILE)
    column_tiles = triton.cdiv(classes, sizes.TILE) + triton.cdiv(negatives, sizes.TILE)
    per_patch = local.new_empty(2, images, column_tiles, patches)
    per_class = local.new_empty(2, images, patch_tiles, classes)
    _tile_sums[(images * patch_tiles * column_tiles,)](
        local,
        columns,
        *per_patch,
        *per_class,
        patches,
        classes,
        negatives,
        width,
        scale,
        TILE=sizes.TILE,
        DEPTH=sizes.DEPTH,
        **sizes.OPTIONS,
    )
    return per_patch, per_class


@triton.jit
def _tile_sums(
    local,  # [N, P, d]
    columns,  # [C + M, d], classes first
    patch_top,  # [N, column tiles, P]: maximum over a tile's columns
    patch_sum,  # and sum of exp(logit - maximum)
    class_top,  # [N, patch tiles, C]: the same over a tile's patches
    class_sum,
    P,
    C,
    M,
    d,
    scale,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    class_tiles = tl.cdiv(C, TILE)
    column_tiles = class_tiles + tl.cdiv(M, TILE)
    patch_tiles = tl.cdiv(P, TILE)
    # Column tiles run fastest: programs that run together share their patches and all of `columns` in the cache.
    column_tile = tl.program_id(0) % column_tiles
    patch_tile = tl.program_id(0) // column_tiles % patch_tiles
    image = (tl.program_id(0) // column_tiles // patch_tiles).to(tl.int64)

    is_class = column_tile < class_tiles
    first = tl.where(is_class, column_tile * TILE, C + (column_tile - class_tiles) * TILE)
    patch = patch_tile * TILE + tl.arange(0, TILE)
    column = first + tl.arange(0, TILE)
    patch_in = patch < P
    column_in = column < tl.where(is_class, C, C + M)

    depth = tl.arange(0, DEPTH)
    patch_at = local + image * P * d + patch[:, None] * d + depth[None, :]
    column_at = columns + column[None, :].to(tl.int64) * d + depth[:, None]
    logits = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, d, DEPTH):
        a = tl.load(patch_at + start, patch_in[:, None] & (start + depth[None, :] < d), 0.0)
        b = tl.load(column_at + start, column_in[None, :] & (start + depth[:, None] < d), 0.0)
        logits = tl.dot(a, b, logits, input_precision="ieee")
    logits *= scale

    over_columns = tl.where(column_in[None, :], logits, float("-inf"))
    top = tl.max(over_columns, 1)
    at = (image * column_tiles + column_tile) * P + patch
    tl.store(patch_top + at, top, patch_in)
    tl.store(patch_sum + at, tl.sum(tl.exp(over_columns - top[:, None]), 1), patch_in)

    over_patches = tl.where(patch_in[:, None], logits, float("-inf"))
    top = tl.max(over_patches, 0)
    at = (image * patch_tiles + patch_tile) * C + column
    # Columns of negatives are not below C.
    tl.store(class_top + at, top, column < C)
    tl.store(class_sum + at, tl.sum(tl.exp(over_patches - top[None, :]), 0), column < C)
