"""The plain form: all experts on all images, then a choice."""

from __future__ import annotations

import torch
from torch import Tensor

from ood_mofe.experts import StackedExperts


def all_tokens(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """The block of each image's expert [B, T, D]."""
    every = torch.stack([experts.block(e, tokens) for e in range(len(experts))], 1)
    return every[torch.arange(len(tokens), device=tokens.device), expert]


def class_token(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """Its first token [B, D]."""
    return all_tokens(tokens, expert, experts)[:, 0]
