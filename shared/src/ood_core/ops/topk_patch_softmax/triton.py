# mypy: allow-untyped-defs
"""The form for CUDA and HIP devices: tiles of logits that live in registers only, never in memory.

Entries are s = logit - logsumexp, grouped by (row, tile of columns); rows are patches in one direction and classes in
the other. The k largest entries of a matrix lie in the k groups with the largest maxima, whichever groups are taken
among equal maxima: an entry outside is no larger than k others inside. So

1. `_tile_sums` multiplies once and keeps of every tile each row's and each column's maximum and sum of exponentials:
   from these follow all logsumexp and all group maxima, in 4 / TILE of the memory of the logits;
2. `torch.topk` takes the k best groups of every image (equal values need no care, nothing waits for the host);
3. `_group_entries` multiplies these groups again, and `torch.topk` takes the k largest of k * TILE entries.

Only the k winners are exponentiated again. Step 1 is nearly all of the work: 2 N P (C + M) d FLOP in full float32 at
TILE / 4 FLOP per byte, most of them from the second-level cache, so arithmetic should bound it. Step 3 reads
2 N k TILE d numbers. Nothing here has been timed on a GPU.

Traps: padded rows and columns give logit 0, so each reduction masks its own axis only, which leaves no all -inf slice
and no NaN; a tile never holds both classes and negatives, because the latter enter denominators only; tf32, the
default for float32 on matrix units, keeps 11 bits only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ood_core.ops.topk_patch_softmax.torch import chunked

# TILE x TILE logits per program, DEPTH features at a time; groups have TILE entries.
_TILE, _DEPTH = 64, 16
# Fusion is named because its default changes between versions of Triton.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Entries in the kept groups, at most, as a fraction of all P * C. Below 1, so there are always more than k groups.
_KEPT = 0.25


def tiled(
    local: Tensor, text: Tensor, negatives: Tensor | None, ks: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Image-to-text and text-to-image means, each [N, K] for the K values in `ks`; without gradients.

    float64 goes to the torch backend, and so does a k whose groups would hold more than a quarter of all entries
    (k * TILE against P * C): skipping the others would save little.
    """
    patches, classes = local.shape[1], len(text)
    if local.dtype != torch.float32 or max(ks) * _TILE > _KEPT * patches * classes:
        return chunked(local, text, negatives, ks, temperature)
    local, text = local.detach().contiguous(), text.detach().contiguous()
    columns = text if negatives is None else torch.cat([text, negatives.detach()])
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(local):
        per_patch, per_class = _all_tile_sums(local, columns, classes, 1 / temperature)
        image_to_text = _means_of_largest(local, text[None], per_patch, ks, 1 / temperature)
        text_to_image = _means_of_largest(text[None], local, per_class, ks, 1 / temperature)
    return image_to_text, text_to_image * (patches / classes)


def compiled() -> bool:
    """Whether the kernels are compiled for a device; False in the interpreter (TRITON_INTERPRET=1), which takes any."""
    return isinstance(_tile_sums, triton.JITFunction)


def _all_tile_sums(local: Tensor, columns: Tensor, classes: int, scale: float) -> tuple[Tensor, Tensor]:
    """Maxima and sums of exponentials: [2, N, column tiles, P] over columns, [2, N, patch tiles, C] over patches."""
    images, patches, width = local.shape
    negatives = len(columns) - classes
    patch_tiles = triton.cdiv(patches, _TILE)
    column_tiles = triton.cdiv(classes, _TILE) + triton.cdiv(negatives, _TILE)
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
        TILE=_TILE,
        DEPTH=_DEPTH,
        **_OPTIONS,
    )
    return per_patch, per_class


def _means_of_largest(rows: Tensor, columns: Tensor, sums: Tensor, ks: list[int], scale: float) -> Tensor:
    """Means of exp of the k largest of scale * rows @ columns.T - logsumexp, for every k: [N, K].

    rows [N or 1, R, d], columns [N or 1, S, d]; `sums` [2, N, tiles, R] are the rows' maxima and sums of exponentials
    per tile of columns, those of the S first.
    """
    top, total = sums
    images, _, row_count = top.shape
    column_count, most = columns.shape[1], max(ks)
    peak = top.amax(1)
    normaliser = peak + (total * (top - peak[:, None]).exp()).sum(1).log()
    best = top[:, : triton.cdiv(column_count, _TILE)] - normaliser[:, None]
    groups = best.flatten(1).topk(most, sorted=False).indices
    entries = top.new_empty(images, most, _TILE)
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
        TILE=_TILE,
        DEPTH=_DEPTH,
        **_OPTIONS,
    )
    winners = entries.flatten(1).topk(most).values.exp()
    return torch.stack([winners[:, :k].mean(1) for k in ks], 1)


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
