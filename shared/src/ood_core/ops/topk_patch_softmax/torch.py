"""The fast form on any device: a few images at a time, one matmul each, no probability tensor.

Both softmaxes are monotone in logit - logsumexp, so the k largest entries are found in log space and only they are
exponentiated. The k largest entries of a matrix lie in the k rows with the largest maxima, so most rows (and, for
the other direction, columns) never reach the selection. Both steps are exact, ties included.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Logits held at a time, in elements: large enough for an efficient matmul, small enough for the cache.
_CHUNK = 1 << 20


def chunked(local: Tensor, text: Tensor, negatives: Tensor | None, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Image-to-text and text-to-image means, each [N]."""
    columns = text if negatives is None else torch.cat([text, negatives])
    images = max(1, _CHUNK // (local.shape[1] * len(columns)))
    parts = [_match(chunk, columns, len(text), k, temperature) for chunk in local.split(images)]
    image_to_text, text_to_image = (torch.cat(part) for part in zip(*parts, strict=True))
    return image_to_text, text_to_image * (local.shape[1] / len(text))


def _match(local: Tensor, columns: Tensor, classes: int, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    logits = (local.reshape(-1, local.shape[-1]) @ columns.T).view(*local.shape[:2], -1) / temperature
    per_patch = _logsumexp(logits, -1)
    logits = logits[..., :classes]
    per_class = _logsumexp(logits, -2)
    image_to_text = _mean_of_largest(logits - per_patch, k)
    text_to_image = _mean_of_largest((logits - per_class).transpose(-1, -2), k)
    return image_to_text, text_to_image


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """With kept dimension; torch.logsumexp is many times slower on CPU."""
    top = x.amax(dim, keepdim=True)
    return top + (x - top).exp().sum(dim, keepdim=True).log()


def _mean_of_largest(scores: Tensor, k: int) -> Tensor:
    """Mean of exp of the k largest entries of each [R, S] matrix, after keeping its k best rows."""
    if k < scores.shape[1]:
        rows = scores.amax(-1).topk(k).indices
        scores = scores.gather(1, rows[..., None].expand(-1, -1, scores.shape[-1]))
    return scores.flatten(1).topk(k).values.exp().mean(-1)
