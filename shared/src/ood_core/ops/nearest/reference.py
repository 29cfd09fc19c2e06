"""The plain form: all differences, then the k-th smallest length."""

from __future__ import annotations

from torch import Tensor


def distance_to_kth(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Euclidean distance [N] of each query [N, d] to its k-th nearest entry of the bank [K, d]."""
    return (queries[:, None] - bank).norm(dim=-1).kthvalue(k).values
