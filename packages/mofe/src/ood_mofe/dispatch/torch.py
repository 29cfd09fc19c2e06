"""The form for any device: each expert on its own images, for the class token with keys and values folded away."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_mofe.experts import StackedExperts


def all_tokens(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """The block of each image's expert [B, T, D]."""
    return _by_expert(tokens, expert, len(experts), experts.block)


def class_token(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """Its first token [B, D]."""
    return _by_expert(tokens, expert, len(experts), lambda e, z: _folded(e, z, experts))


def _by_expert(tokens: Tensor, expert: Tensor, count: int, run: Callable[[int, Tensor], Tensor]) -> Tensor:
    rows = [(expert == e).nonzero()[:, 0] for e in range(count)]
    parts = [run(e, tokens[mine]) for e, mine in enumerate(rows) if len(mine)]
    # Sorted by expert, then put back: in-place assignment would fail under autocast.
    return torch.cat(parts)[torch.cat(rows).argsort()]


def _folded(e: int, z: Tensor, experts: StackedExperts) -> Tensor:
    """One expert's class token [b, D] from tokens [b, T, D]."""
    p, heads, width = experts, experts.num_heads, experts.width
    normed = F.layer_norm(z, (width,), eps=p.eps)
    gain, shift = p.norm1_weight[e], p.norm1_bias[e]
    query, key, value = p.qkv_weight[e].view(3, heads, -1, width)
    query_bias, _, value_bias = p.qkv_bias[e].view(3, heads, -1)  # the key's bias cancels in the softmax
    q = torch.einsum("bd,hkd->bhk", gain * normed[:, 0] + shift, query) + query_bias
    folded = gain * torch.einsum("bhk,hkd->bhd", q, key) * key.shape[1] ** -0.5
    attention = (folded @ normed.mT).softmax(-1)  # [b, heads, T]
    mean = gain * (attention @ normed) + shift  # the weights sum to 1, so the shift stays as it is
    out = torch.einsum("bhd,hkd->bhk", mean, value) + value_bias
    out = F.linear(out.flatten(1), p.out_weight[e], p.out_bias[e])
    return p.feed_forward(e, z[:, 0] + (out if p.scale1 is None else out * p.scale1[e]))
