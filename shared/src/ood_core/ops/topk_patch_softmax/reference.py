"""The plain form: both probability tensors, then the k largest of each."""

from __future__ import annotations

import torch
from torch import Tensor


def match(
    local: Tensor, text: Tensor, negatives: Tensor | None, ks: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Image-to-text and text-to-image means, each [N, K] for the K values in `ks`."""
    classes, patches = len(text), local.shape[1]
    columns = text if negatives is None else torch.cat([text, negatives])
    logits = local @ columns.T / temperature
    over_classes = logits.softmax(-1)[..., :classes]
    over_patches = logits[..., :classes].softmax(-2)
    image_to_text, text_to_image = (
        torch.stack([p.flatten(1).topk(k).values.mean(-1) for k in ks], 1) for p in (over_classes, over_patches)
    )
    return image_to_text, text_to_image * (patches / classes)
