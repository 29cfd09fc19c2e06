"""Every image through its own expert: on all tokens, or on the class token alone, which is all that is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from ood_core import _check
from torch import Tensor

from ood_mofe.experts import StackedExperts

__all__ = ["expert_class_token", "expert_tokens"]

_BACKENDS = (None, "reference", "torch")


def expert_tokens(tokens: Tensor, expert: Tensor, experts: StackedExperts, *, backend: str | None = None) -> Tensor:
    """The block of each image's expert on all its tokens.

    Args:
        tokens: input of the block [B, T, D].
        expert: int64 [B] in [0, E).
        experts: E stacked blocks of width D.
        backend: None (choose), "reference" (all experts on all images, then a choice) or "torch" (each expert on its
            own images).

    Returns:
        [B, T, D]; an expert without images gets a gradient of zero.

    Raises:
        TypeError: not floating-point tokens, or an expert that is no integer.
        ValueError: shapes that do not fit, NaN, an expert out of range, or an unknown backend.

    Source: the paper's MoFE layer, an image's tokens all through one expert.

    Example:
        >>> from ood_core import create_backbone
        >>> experts = StackedExperts.from_block(create_backbone("tiny").last_block, 2)
        >>> expert_tokens(torch.randn(3, 65, 192), torch.tensor([0, 1, 1]), experts).shape
        torch.Size([3, 65, 192])
    """
    tokens, expert = _checked(tokens, expert, experts, backend)
    return _dispatch(tokens, expert, experts, experts.block, backend)


def expert_class_token(
    tokens: Tensor, expert: Tensor, experts: StackedExperts, *, backend: str | None = None
) -> Tensor:
    """The class token (the first) behind the block of each image's expert: `expert_tokens(...)[:, 0]`, much cheaper.

    Only one query per image is needed, so keys and values are never made: the query is taken through the key weights
    to the normalised tokens, and their weighted mean through the value weights. Exact; about T / 2 times fewer
    operations.

    Args:
        tokens: input of the block [B, T, D].
        expert: int64 [B] in [0, E).
        experts: E stacked blocks of width D.
        backend: None (choose), "reference" (the full block of every expert) or "torch" (the folded form).

    Returns:
        [B, D].

    Raises:
        TypeError, ValueError: as `expert_tokens`.

    Example:
        >>> from ood_core import create_backbone
        >>> experts = StackedExperts.from_block(create_backbone("tiny").last_block, 2)
        >>> expert_class_token(torch.randn(3, 65, 192), torch.tensor([0, 1, 1]), experts).shape
        torch.Size([3, 192])
    """
    tokens, expert = _checked(tokens, expert, experts, backend)
    if backend == "reference":
        return _dispatch(tokens, expert, experts, experts.block, backend)[:, 0]
    return _dispatch(tokens, expert, experts, lambda e, z: _folded(e, z, experts), backend)


def _checked(tokens: Tensor, expert: Tensor, experts: StackedExperts, backend: str | None) -> tuple[Tensor, Tensor]:
    _check.choice("backend", backend, _BACKENDS)
    tokens, _ = _check.tensors(tokens=(tokens, "B T D"), experts=(experts.norm1_weight, "E D"))
    expert = _check.labels("expert", expert, len(tokens), len(experts))
    if expert.device != tokens.device:
        raise ValueError(f"expert is on {expert.device}, tokens are on {tokens.device}: move it there.")
    return tokens.to(experts.norm1_weight.dtype), expert


def _dispatch(
    tokens: Tensor,
    expert: Tensor,
    experts: StackedExperts,
    run: Callable[[int, Tensor], Tensor],
    backend: str | None,
) -> Tensor:
    if backend == "reference":
        every = torch.stack([run(e, tokens) for e in range(len(experts))], 1)
        return every[torch.arange(len(tokens), device=tokens.device), expert]
    rows = [(expert == e).nonzero()[:, 0] for e in range(len(experts))]
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
