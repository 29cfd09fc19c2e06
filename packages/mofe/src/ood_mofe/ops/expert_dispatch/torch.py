"""The form for any device: each expert on its own images, for the class token with keys and values folded away."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_mofe.experts import StackedExperts


def all_tokens(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """The block of each image's expert [B, T, D]."""
    return _by_expert(experts.block, expert, len(experts), tokens)


def class_token(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """Its first token [B, D]; an expert's weights meet one row per image, so that no tokens are moved."""
    p, heads, width = experts, experts.num_heads, experts.width
    normed = F.layer_norm(tokens, (width,), eps=p.eps)

    def through_keys(e: int, first: Tensor) -> Tensor:
        """Queries [b, heads, D] for the normed tokens; the key's bias cancels in the softmax."""
        query, key, _ = p.qkv_weight[e].view(3, heads, -1, width)
        query_bias, _, _ = p.qkv_bias[e].view(3, heads, -1)
        q = torch.einsum("bd,hkd->bhk", p.norm1_weight[e] * first + p.norm1_bias[e], query) + query_bias
        return p.norm1_weight[e] * torch.einsum("bhk,hkd->bhd", q, key) * key.shape[1] ** -0.5

    def through_values(e: int, mean: Tensor, first: Tensor) -> Tensor:
        """The class token from the means [b, heads, D], whose weights sum to 1: the norm's shift stays as it is."""
        value, bias = p.qkv_weight[e].view(3, heads, -1, width)[2], p.qkv_bias[e].view(3, heads, -1)[2]
        out = torch.einsum("bhd,hkd->bhk", p.norm1_weight[e] * mean + p.norm1_bias[e], value) + bias
        out = F.linear(out.flatten(1), p.out_weight[e], p.out_bias[e])
        return p.feed_forward(e, first + (out if p.scale1 is None else out * p.scale1[e]))

    attention = (_by_expert(through_keys, expert, len(p), normed[:, 0]) @ normed.mT).softmax(-1)  # [B, heads, T]
    return _by_expert(through_values, expert, len(p), attention @ normed, tokens[:, 0])


def _by_expert(run: Callable[..., Tensor], expert: Tensor, count: int, *rows: Tensor) -> Tensor:
    """`run(e, *rows of its images)` for each expert, in the order of the images."""
    owned = [(expert == e).nonzero()[:, 0] for e in range(count)]
    parts = [run(e, *(x[mine] for x in rows)) for e, mine in enumerate(owned) if len(mine)]
    # Sorted by expert, then put back: in-place assignment would fail under autocast.
    return torch.cat(parts)[torch.cat(owned).argsort()]
