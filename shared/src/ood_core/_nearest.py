"""Exact search for near neighbours among unit vectors, in one pass over a bank of any size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_core import _check

__all__ = ["distance_to_kth"]

_ROWS = 2**16  # of the bank, in memory at a time
_QUERIES = 256
_PAIRS = 2**14  # of a query and an entry
_GROUP = 64  # cosines in one maximum
_SLACK = 16  # candidates beyond k, for ties that rounding has brought out of order


def distance_to_kth(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Euclidean distance of each query to its k-th nearest entry.

    Cosines only choose candidates: 2 - 2 cos has no digits left for near neighbours, so that candidates are ranked
    again by the distance itself.

    Args:
        queries: [N, d] unit norm.
        bank: [K, d] unit norm, of any floating type and on any device; it is read once, in parts.
        k: 1 to K.

    Returns:
        [N].

    Raises:
        ValueError: NaN in the bank.
    """
    parts = queries.split(_QUERIES)
    found: list[tuple[Tensor, Tensor]] = [(q.new_empty(len(q), 0), q.new_empty(len(q), 0)) for q in parts]
    for chunk in _chunks(bank, queries):
        for i, part in enumerate(parts):
            found[i] = _merge(part, chunk, *found[i], k)
    return torch.cat([distance.kthvalue(k).values for _, distance in found])


def _chunks(bank: Tensor, like: Tensor) -> Iterator[Tensor]:
    for chunk in bank.split(_ROWS):
        yield from _check.tensors(bank=(chunk.to(like), "K d"))


def _merge(queries: Tensor, chunk: Tensor, cosine: Tensor, distance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and distances [N, <= k + slack] of the best candidates so far."""
    known = cosine.shape[1]
    near, column = _largest(queries @ chunk.T, k + _SLACK)
    cosine = torch.cat([cosine, near], 1)
    cosine, kept = cosine.topk(min(k + _SLACK, cosine.shape[1]))
    distance = torch.cat([distance, near], 1).gather(1, kept)
    row, place = (kept >= known).nonzero(as_tuple=True)
    distance[row, place] = _distances(queries, row, chunk, column[row, kept[row, place] - known])
    return cosine, distance


def _distances(queries: Tensor, row: Tensor, chunk: Tensor, column: Tensor) -> Tensor:
    pairs = zip(row.split(_PAIRS), column.split(_PAIRS), strict=True)
    return torch.cat([(queries[i] - chunk[j]).norm(dim=-1) for i, j in pairs])


def _largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`x.topk(count)`, without looking at every value: the largest lie in the groups of the largest maxima."""
    columns = x.shape[1]
    if columns <= count * _GROUP:
        return x.topk(min(count, columns))
    groups = F.pad(x, (0, -columns % _GROUP), value=-torch.inf).unflatten(1, (-1, _GROUP))
    best = groups.amax(-1).topk(count).indices
    values, at = groups.gather(1, best[..., None].expand(-1, -1, _GROUP)).flatten(1).topk(count)
    return values, best.gather(1, at // _GROUP) * _GROUP + at % _GROUP
