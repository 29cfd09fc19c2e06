# mypy: allow-untyped-defs
"""Which image goes where: images sorted by expert, and tiles of rows dealt out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ood_mofe.ops.expert_dispatch.kernels import sizes


class Plan(NamedTuple):
    """Which image goes where.

    Attributes:
        expert: of each image, int64 [B].
        order: the images sorted by expert, int32 [B].
        offsets: where each expert's begin in `order`, int32 [E + 1].
        tile_expert: of each tile of rows, int32; E for tiles that were not needed.
        tile_row: its first row, counting T rows for every image in `order`, int32.
        height: rows of a tile.
        precision: of products, a word of Triton's.
    """

    expert: Tensor
    order: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    height: int
    precision: str


def planned(expert: Tensor, experts: int, tokens: int, precision: str) -> Plan:
    """The plan for rows of this many tokens per image."""
    images = len(expert)
    rows = images * tokens
    height = sizes.FEW if rows < 2 * sizes.MANY * experts else sizes.MANY
    # Each expert that has rows has at most one tile that is not full.
    tiles = min(rows, (rows + min(experts, images) * (height - 1)) // height)
    order, offsets, tile_expert, tile_row = (
        torch.empty(size, dtype=torch.int32, device=expert.device) for size in (images, experts + 1, tiles, tiles)
    )
    with torch.cuda.device_of(expert):
        _plan[(1,)](
            expert.contiguous(),
            order,
            offsets,
            tile_expert,
            tile_row,
            images,
            tokens,
            experts,
            tiles,
            height,
            ROWS=sizes.PLANNED,
            EXPERTS=triton.next_power_of_2(experts + 1),
            **sizes.OPTIONS,
        )
    return Plan(expert, order, offsets, tile_expert, tile_row, height, precision)


@triton.jit
def _plan(
    expert,  # int64 [B]
    order,  # [B]: images sorted by expert, in their order within one
    offsets,  # [E + 1]: where each expert's images begin in it
    tile_expert,  # [tiles]: E behind the last tile
    tile_row,  # [tiles]: its first row, of T rows per image
    B,
    T,
    E,
    tiles,
    height,  # of a tile
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two above E
):
    e = tl.arange(0, EXPERTS)[None, :]
    row = tl.arange(0, ROWS)
    counts = tl.full((EXPERTS,), 0, tl.int32)
    for start in range(0, B, ROWS):
        mine = tl.load(expert + start + row, start + row < B, -1)
        counts += tl.sum((mine[:, None] == e).to(tl.int32), 0)
    place = tl.cumsum(counts, 0) - counts
    tl.store(offsets + tl.arange(0, EXPERTS), place, tl.arange(0, EXPERTS) <= E)

    needed = tl.cdiv(counts * T, height)
    behind = tl.cumsum(needed, 0)
    # Row of a tile = height * its number + this.
    ahead = place * T - (behind - needed) * height
    for start in range(0, tiles, ROWS):
        tile = start + row
        mine = tl.minimum(tl.sum((behind[None, :] <= tile[:, None]).to(tl.int32), 1), E)
        first = height * tile + tl.sum(tl.where(mine[:, None] == e, ahead[None, :], 0), 1)
        tl.store(tile_expert + tile, mine, tile < tiles)
        tl.store(tile_row + tile, first, tile < tiles)

    for start in range(0, B, ROWS):
        mine = tl.load(expert + start + row, start + row < B, -1)
        member = (mine[:, None] == e).to(tl.int32)
        earlier = tl.cumsum(member, 0) - member
        at = tl.sum(member * (place[None, :] + earlier), 1)
        tl.store(order + at, start + row, start + row < B)
        place += tl.sum(member, 0)


@triton.jit
def row_of(order, position, stop, T):
    """Where the rows at these positions of the sorted order lie: T of each image."""
    image = tl.load(order + position // T, position < stop, 0).to(tl.int64)
    return image * T + position % T
