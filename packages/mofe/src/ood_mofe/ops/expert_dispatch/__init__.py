"""Every image through its own expert: on all tokens, or on the class token alone, which is all that is read."""

from __future__ import annotations

from ood_core import check
from ood_core.ops.backend import implementation
from torch import Tensor

from ood_mofe.experts import StackedExperts

__all__ = ["expert_class_token", "expert_tokens"]


def expert_tokens(tokens: Tensor, expert: Tensor, experts: StackedExperts, *, backend: str | None = None) -> Tensor:
    """The block of each image's expert on all its tokens.

    Args:
        tokens: input of the block [B, T, D].
        expert: int64 [B] in [0, E).
        experts: E stacked blocks of width D.
        backend: "reference" (all experts on all images, then a choice), "torch" (each expert on its own images),
            "triton" (kernels for CUDA and HIP devices) or None: "triton" where it can run, otherwise "torch".

    Returns:
        [B, T, D]; an expert without images gets a gradient of zero.

    Raises:
        TypeError: not floating-point tokens, or an expert that is no integer.
        ValueError: shapes that do not fit, NaN, an expert out of range, an unknown backend, or "triton" where it
            cannot run.

    Source: the paper's MoFE layer, an image's tokens all through one expert.

    Example:
        >>> import torch
        >>> from ood_core import create_backbone
        >>> experts = StackedExperts.from_block(create_backbone("tiny").last_block, 2)
        >>> expert_tokens(torch.randn(3, 65, 192), torch.tensor([0, 1, 1]), experts).shape
        torch.Size([3, 65, 192])
    """
    tokens, expert = _checked(tokens, expert, experts)
    return implementation(__name__, backend, tokens).all_tokens(tokens, expert, experts)


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
        backend: "reference" (the full block of every expert), "torch" (the folded form), "triton" (the folded form in
            kernels for CUDA and HIP devices; its attention runs in torch if `tokens` require a gradient) or None:
            "triton" where it can run, otherwise "torch".

    Returns:
        [B, D].

    Raises:
        TypeError, ValueError: as `expert_tokens`.

    Example:
        >>> import torch
        >>> from ood_core import create_backbone
        >>> experts = StackedExperts.from_block(create_backbone("tiny").last_block, 2)
        >>> expert_class_token(torch.randn(3, 65, 192), torch.tensor([0, 1, 1]), experts).shape
        torch.Size([3, 192])
    """
    tokens, expert = _checked(tokens, expert, experts)
    return implementation(__name__, backend, tokens).class_token(tokens, expert, experts)


def _checked(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> tuple[Tensor, Tensor]:
    tokens, _ = check.tensors(tokens=(tokens, "B T D"), experts=(experts.norm1_weight, "E D"))
    expert = check.labels("expert", expert, len(tokens), len(experts))
    if expert.device != tokens.device:
        raise ValueError(f"expert is on {expert.device}, tokens are on {tokens.device}: move it there.")
    return tokens.to(experts.norm1_weight.dtype), expert
