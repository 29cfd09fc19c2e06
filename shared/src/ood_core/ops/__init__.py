"""Operations with more than one implementation; every backend gives the same values."""

from ood_core.ops.topk_patch_softmax import PatchSoftmax, topk_patch_softmax

__all__ = ["PatchSoftmax", "topk_patch_softmax"]
