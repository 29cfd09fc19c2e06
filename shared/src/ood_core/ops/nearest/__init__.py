"""Exact distances to near neighbours."""

from ood_core.ops.nearest.torch import distance_to_kth

__all__ = ["distance_to_kth"]
