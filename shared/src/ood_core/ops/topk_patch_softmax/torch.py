"""The fast form on any device: a few images at a time, one matmul and one exponential each, no probability tensor.

Both softmaxes are monotone in logit - logsumexp, so the k largest entries are found in log space and only they are
exponentiated again. The k largest entries of a matrix lie in the k rows with the largest maxima, and of these in the k
columns with the largest maxima, so most entries never reach the selection. Both steps are exact, ties included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sums = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# Logits held at a time, in elements: large enough for an efficient matmul, small enough for the cache.
_CHUNK = 1 << 20
# exp(+-40) times any number of classes is far inside float32: below this no maximum need be subtracted first.
_SAFE = 40.0


def match(
    local: Tensor, text: Tensor, negatives: Tensor | None, ks: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Image-to-text and text-to-image means, each [N, K] for the K values in `ks`."""
    columns = text if negatives is None else torch.cat([text, negatives])
    largest = local.norm(dim=-1).amax() * columns.norm(dim=-1).amax() / temperature
    sums = _safe_sums if local.device.type == "cpu" and largest < _SAFE else _stable_sums
    images = max(1, _CHUNK // (local.shape[1] * len(columns)))
    parts = [_match_chunk(chunk, columns, len(text), ks, temperature, sums) for chunk in local.split(images)]
    image_to_text, text_to_image = (torch.cat(part) for part in zip(*parts, strict=True))
    return image_to_text, text_to_image * (local.shape[1] / len(text))


def _match_chunk(
    local: Tensor, columns: Tensor, classes: int, ks: list[int], temperature: float, sums: Sums
) -> tuple[Tensor, Tensor]:
    logits = (local.reshape(-1, local.shape[-1]) @ columns.T).view(*local.shape[:2], -1)
    if temperature != 1:
        logits = logits / temperature
    per_patch, per_class = sums(logits, classes)
    logits = logits[..., :classes]
    image_to_text = _means_of_largest(logits, logits.amax(2) - per_patch, per_patch, ks)
    text_to_image = _means_of_largest(logits.mT, logits.amax(1) - per_class, per_class, ks)
    return image_to_text, text_to_image


def _safe_sums(logits: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Logsumexp over columns [N, P] and, for the classes, over patches [N, C], from one exponential."""
    exponentials = logits.exp()
    return exponentials.sum(2).log(), exponentials[..., :classes].sum(1).log()


def _stable_sums(logits: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The same for logits of any size; torch.logsumexp is many times slower on CPU."""
    found = []
    for x, dim in ((logits, 2), (logits[..., :classes], 1)):
        top = x.amax(dim, keepdim=True)
        found.append((top + (x - top).exp().sum(dim, keepdim=True).log()).squeeze(dim))
    return found[0], found[1]


def _means_of_largest(logits: Tensor, best: Tensor, normaliser: Tensor, ks: list[int]) -> Tensor:
    """Means of exp of the k largest entries of logits - normaliser, for every k: [N, K].

    logits [N, R, S], normaliser [N, R]; `best` [N, R] are the rows' largest entries of the difference.
    """
    most, images = max(ks), torch.arange(len(logits), device=logits.device)[:, None]
    if most < logits.shape[1]:
        rows = best.topk(most).indices
        logits, normaliser = logits[images, rows], normaliser[images, rows]
    shifted = logits - normaliser[..., None]
    if most < shifted.shape[2]:
        shifted = shifted.mT[images, shifted.amax(1).topk(most).indices]
    top = shifted.flatten(1).topk(most).values.exp()
    return torch.stack([top[:, :k].mean(1) for k in ks], 1)
