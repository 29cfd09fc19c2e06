"""Exact search for near neighbours among unit vectors, in one pass over a bank of any size.

Where the hardware multiplies in half precision at a multiple of the speed, a first pass does so and takes so many
candidates that rounding cannot have left out a neighbour; queries for which that is not certain are searched again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ood_core import check
from ood_core.devices import cpu_has_bfloat16

__all__ = ["distance_to_kth"]

_ROWS = 2**14  # of the bank, in memory at a time
_QUERIES = 512
_SLACK = 16  # candidates to both sides of k, for what rounding has brought out of order
# How far a cosine of unit vectors may be off if both are rounded to half precision, and so is the result: at most three
# units of roundoff (2^-11 and 2^-9), one more for sums in float32; GPUs may also add parts of a sum in half precision.
_MARGIN = {torch.float16: 8 * 2**-11, torch.bfloat16: 4 * 2**-9}
_WIDER = 4  # candidates of the first pass, by k


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
    half = _half_precision(queries)
    if half is None:
        return _in_full_precision(queries, bank, k)
    parts, found, certain = queries.split(_QUERIES), [], []
    for part, (cosine, entries) in zip(parts, _largest(queries, bank, _WIDER * k + _SLACK, half), strict=True):
        # Two errors: one may have lowered a neighbour, the other raised the k-th.
        reach = cosine[:, k - 1].float() - cosine[:, -1].float() > 2 * _MARGIN[half]
        certain.append(reach | (entries.shape[1] == len(bank)))
        found.append(_ranked_again(part, bank, _sorted_by_cosine(part, bank, entries, k), k))
    distances, left = torch.cat(found), ~torch.cat(certain)
    if left.any():
        distances[left] = _in_full_precision(queries[left], bank, k)
    return distances


def _in_full_precision(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    parts = zip(queries.split(_QUERIES), _largest(queries, bank, k + _SLACK), strict=True)
    return torch.cat([_ranked_again(part, bank, entries, k) for part, (_, entries) in parts])


def _half_precision(queries: Tensor) -> torch.dtype | None:
    """What multiplies faster than float32 on this device."""
    if queries.dtype != torch.float32:
        return None
    if queries.is_cuda:
        return torch.float16
    return torch.bfloat16 if queries.device.type == "cpu" and cpu_has_bfloat16() else None


def _largest(
    queries: Tensor, bank: Tensor, count: int, precision: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Of every `_QUERIES` queries the `count` largest cosines and their entries, largest first."""
    precision = precision or queries.dtype
    parts = queries.to(precision).split(_QUERIES)
    best: list[tuple[Tensor, Tensor]] = [(q.new_empty(len(q), 0), q.new_empty(len(q), 0).long()) for q in parts]
    for start, chunk in _chunks(bank, queries):
        columns = chunk.to(precision).T
        for number, part in enumerate(parts):
            cosine, column = (part @ columns).topk(min(count, len(chunk)))
            best[number] = _merged(best[number], (cosine, column + start), count)
    return best


def _sorted_by_cosine(queries: Tensor, bank: Tensor, entries: Tensor, k: int) -> Tensor:
    """The entries of the `k + _SLACK` largest cosines in full precision, largest first."""
    cosine = torch.stack([(queries * bank[e.to(bank.device)].to(queries)).sum(1) for e in entries.T], 1)
    return entries.gather(1, cosine.topk(min(k + _SLACK, entries.shape[1])).indices)


def _chunks(bank: Tensor, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(bank), _ROWS):
        (chunk,) = check.tensors(bank=(bank[start : start + _ROWS].to(like), "K d"))
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
