"""Exact search for near neighbours among unit vectors, in one pass over a bank of any size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ood_core import _check

__all__ = ["distance_to_kth"]

_ROWS = 2**14  # of the bank, in memory at a time
_QUERIES = 512
_SLACK = 16  # candidates to both sides of k, for what rounding has brought out of order


def distance_to_kth(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Euclidean distance of each query to its k-th nearest entry.

    Cosines only choose candidates: 2 - 2 cos has no digits left for near neighbours, so that those around the k-th are
    ranked again by the distance itself.

    Args:
        queries: [N, d] unit norm.
        bank: [K, d] unit norm, of any floating type and on any device; it is read once, in parts, and then only at the
            candidates.
        k: 1 to K.

    Returns:
        [N].

    Raises:
        ValueError: NaN in the bank.
    """
    parts = queries.split(_QUERIES)
    best: list[tuple[Tensor, Tensor]] = [(q.new_empty(len(q), 0), q.new_empty(len(q), 0).long()) for q in parts]
    for start, chunk in _chunks(bank, queries):
        for number, part in enumerate(parts):
            cosine, column = (part @ chunk.T).topk(min(k + _SLACK, len(chunk)))
            best[number] = _merged(best[number], (cosine, column + start), k + _SLACK)
    pairs = zip(parts, best, strict=True)
    return torch.cat([_ranked_again(part, bank, entries, k) for part, (_, entries) in pairs])


def _chunks(bank: Tensor, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(bank), _ROWS):
        (chunk,) = _check.tensors(bank=(bank[start : start + _ROWS].to(like), "K d"))
        yield start, chunk


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The entries of the largest cosines of both, largest first."""
    cosine, entry = (torch.cat(both, 1) for both in zip(one, other, strict=True))
    cosine, kept = cosine.topk(min(count, cosine.shape[1]))
    return cosine, entry.gather(1, kept)


def _ranked_again(queries: Tensor, bank: Tensor, entries: Tensor, k: int) -> Tensor:
    """Distance to the k-th of entries [N, M] that are sorted by cosine: those near rank k are sorted by distance."""
    surely_nearer = max(0, k - 1 - _SLACK)
    columns = entries[:, surely_nearer:].T.to(bank.device)
    distances = torch.stack([(queries - bank[column].to(queries)).norm(dim=-1) for column in columns], 1)
    return distances.kthvalue(k - surely_nearer).values
