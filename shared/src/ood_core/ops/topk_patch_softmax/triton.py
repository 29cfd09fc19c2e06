# mypy: allow-untyped-defs
"""The form for CUDA and HIP devices: tiles of logits that live in registers only, never in memory.

Entries are s = logit - logsumexp, grouped by (row, tile of columns); rows are patches in one direction and classes in
the other. The k largest entries of a matrix lie in the k groups with the largest maxima, whichever groups are taken
among equal maxima: an entry outside is no larger than k others inside. So

1. `tile_sums` multiplies once and keeps of every tile each row's and each column's maximum and sum of exponentials:
   from these follow all logsumexp and all group maxima, in 4 / TILE of the memory of the logits;
2. `torch.topk` takes the k best groups of every image (equal values need no care, nothing waits for the host);
3. `group_entries` multiplies these groups again, and `torch.topk` takes the k largest of k * TILE entries.

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
from torch import Tensor

from ood_core.ops.topk_patch_softmax import torch as chunked
from ood_core.ops.topk_patch_softmax.kernels import sizes
from ood_core.ops.topk_patch_softmax.kernels.group_entries import group_entries
from ood_core.ops.topk_patch_softmax.kernels.tile_sums import _tile_sums, tile_sums

# Entries in the kept groups, at most, as a fraction of all P * C. Below 1, so there are always more than k groups.
_KEPT = 0.25


def match(
    local: Tensor, text: Tensor, negatives: Tensor | None, ks: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Image-to-text and text-to-image means, each [N, K] for the K values in `ks`; without gradients.

    float64 goes to the torch backend, and so does a k whose groups would hold more than a quarter of all entries
    (k * TILE against P * C): skipping the others would save little.
    """
    patches, classes = local.shape[1], len(text)
    if local.dtype != torch.float32 or max(ks) * sizes.TILE > _KEPT * patches * classes:
        return chunked.match(local, text, negatives, ks, temperature)
    local, text = local.detach().contiguous(), text.detach().contiguous()
    columns = text if negatives is None else torch.cat([text, negatives.detach()])
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(local):
        per_patch, per_class = tile_sums(local, columns, classes, 1 / temperature)
        image_to_text = _means_of_largest(local, text[None], per_patch, ks, 1 / temperature)
        text_to_image = _means_of_largest(text[None], local, per_class, ks, 1 / temperature)
    return image_to_text, text_to_image * (patches / classes)


def compiled() -> bool:
    """Whether the kernels are compiled for a device; False in the interpreter (TRITON_INTERPRET=1), which takes any."""
    return isinstance(_tile_sums, triton.JITFunction)


def _means_of_largest(rows: Tensor, columns: Tensor, sums: Tensor, ks: list[int], scale: float) -> Tensor:
    """Means of exp of the k largest of scale * rows @ columns.T - logsumexp, for every k: [N, K].

    rows [N or 1, R, d], columns [N or 1, S, d]; `sums` [2, N, tiles, R] are the rows' maxima and sums of exponentials
    per tile of columns, those of the S first.
    """
    top, total = sums
    column_count, most = columns.shape[1], max(ks)
    peak = top.amax(1)
    normaliser = peak + (total * (top - peak[:, None]).exp()).sum(1).log()
    best = top[:, : triton.cdiv(column_count, sizes.TILE)] - normaliser[:, None]
    groups = best.flatten(1).topk(most, sorted=False).indices
    entries = group_entries(rows, columns, groups, normaliser, scale)
    winners = entries.flatten(1).topk(most).values.exp()
    return torch.stack([winners[:, :k].mean(1) for k in ks], 1)
