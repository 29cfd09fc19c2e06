"""The experts: copies of a transformer block with their parameters stacked."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from ood_core import check
from ood_core.backbones.blocks import NOT_PLAIN, plain_block
from ood_core.errors import UsageError
from torch import Tensor, nn

__all__ = ["StackedExperts"]

_ACTIVATIONS = ("gelu", "quick_gelu")


class StackedExperts(nn.Module):
    """E pre-norm transformer blocks of one shape, every parameter stacked along the first dimension.

    Args:
        norm1_weight: [E, D].
        norm1_bias: [E, D].
        qkv_weight: [E, 3 D, D], query, key and value rows, heads contiguous.
        qkv_bias: [E, 3 D].
        out_weight: [E, D, D].
        out_bias: [E, D].
        scale1: LayerScale behind the attention [E, D], or None.
        norm2_weight: [E, D].
        norm2_bias: [E, D].
        up_weight: [E, F, D].
        up_bias: [E, F].
        down_weight: [E, D, F].
        down_bias: [E, D].
        scale2: LayerScale behind the MLP [E, D], or None.
        num_heads: attention heads, a divisor of D.
        eps: of both norms.
        activation: "gelu" or "quick_gelu".

    Raises:
        TypeError: a parameter that is no floating-point tensor.
        ValueError: shapes that do not fit, NaN, heads that do not divide D, or an unknown activation.

    Example:
        >>> from ood_core import create_backbone
        >>> experts = StackedExperts.from_block(create_backbone("tiny").last_block, 3)
        >>> len(experts), experts.width
        (3, 192)
    """

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    scale1: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    scale2: Tensor | None

    def __init__(
        self,
        norm1_weight: Tensor,
        norm1_bias: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        scale1: Tensor | None,
        norm2_weight: Tensor,
        norm2_bias: Tensor,
        up_weight: Tensor,
        up_bias: Tensor,
        down_weight: Tensor,
        down_bias: Tensor,
        scale2: Tensor | None,
        *,
        num_heads: int,
        eps: float = 1e-6,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        letters = {
            "norm1_weight": (norm1_weight, "E D"),
            "norm1_bias": (norm1_bias, "E D"),
            "qkv_weight": (qkv_weight, "E QKV D"),
            "qkv_bias": (qkv_bias, "E QKV"),
            "out_weight": (out_weight, "E D D"),
            "out_bias": (out_bias, "E D"),
            "scale1": (scale1, "E D"),
            "norm2_weight": (norm2_weight, "E D"),
            "norm2_bias": (norm2_bias, "E D"),
            "up_weight": (up_weight, "E F D"),
            "up_bias": (up_bias, "E F"),
            "down_weight": (down_weight, "E D F"),
            "down_bias": (down_bias, "E D"),
            "scale2": (scale2, "E D"),
        }
        for name, value in zip(letters, check.tensors(**letters), strict=True):
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))
        if qkv_weight.shape[1] != 3 * self.width:
            raise ValueError(f"qkv_weight has {qkv_weight.shape[1]} rows, not 3 times the width {self.width}.")
        check.integer("num_heads", num_heads, 1, self.width)
        if self.width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {self.width}.")
        self.num_heads, self.eps = num_heads, check.positive("eps", eps)
        self.activation = check.choice("activation", activation, _ACTIVATIONS)

    def __len__(self) -> int:
        return len(self.norm1_weight)

    @property
    def width(self) -> int:
        """D."""
        return self.norm1_weight.shape[1]

    @classmethod
    def from_block(cls, block: nn.Module, count: int) -> Self:
        """`count` copies of a block of timm, open_clip or transformers.

        Args:
            block: a pre-norm block with a plain MLP, e.g. `backbone.last_block`.
            count: number of experts, at least 1.

        Raises:
            UsageError: a block of another kind.
        """
        check.integer("count", count, 1, 2**31)
        parameters, options = plain_block(block)
        stacked = {
            name: None if value is None else value.detach().expand(count, *value.shape)
            for name, value in parameters.items()
        }
        experts = cls(**stacked, **options)  # type: ignore[arg-type]
        _check_copy(getattr(block, "layer", block), experts)
        return experts

    def block(self, expert: int, tokens: Tensor) -> Tensor:
        """One expert on tokens [B, T, D]: attention and MLP with their residuals."""
        e, width = expert, self.width
        x = F.layer_norm(tokens, (width,), self.norm1_weight[e], self.norm1_bias[e], self.eps)
        qkv = F.linear(x, self.qkv_weight[e], self.qkv_bias[e]).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out = F.linear((attention @ v).transpose(1, 2).flatten(2), self.out_weight[e], self.out_bias[e])
        return self.feed_forward(expert, tokens + _scaled(out, self.scale1, e))

    def feed_forward(self, expert: int, x: Tensor) -> Tensor:
        """The MLP half of one expert on [..., D]."""
        e = expert
        y = F.layer_norm(x, (self.width,), self.norm2_weight[e], self.norm2_bias[e], self.eps)
        y = self.activate(F.linear(y, self.up_weight[e], self.up_bias[e]))
        return x + _scaled(F.linear(y, self.down_weight[e], self.down_bias[e]), self.scale2, e)

    def activate(self, x: Tensor) -> Tensor:
        """GELU, or CLIP's approximation of it."""
        return F.gelu(x) if self.activation == "gelu" else x * (1.702 * x).sigmoid()


def _scaled(x: Tensor, scale: Tensor | None, expert: int) -> Tensor:
    return x if scale is None else x * scale[expert]


# ---- blocks of the libraries


@torch.no_grad()
def _check_copy(block: Any, experts: StackedExperts) -> None:
    """Windows, rotary positions, norms of queries: what the parameters do not tell shows in what a block computes."""
    weight = next(block.parameters())
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, experts.width, generator=rng).to(weight)
    try:
        found = block(x, None) if type(block).__module__.startswith("transformers") else block(x)
        found = found[0] if isinstance(found, tuple) else found
        ours = experts.block(0, x.to(experts.norm1_weight))
        exact = weight.dtype in (torch.float32, torch.float64)
        same = torch.allclose(ours, found.to(ours), atol=1e-3 if exact else 0.2, rtol=1e-3 if exact else 0.05)
    except (RuntimeError, ValueError, TypeError):
        same = False
    if not same:
        raise UsageError(NOT_PLAIN.format(type(block).__name__))
