"""Towers that pool with attention (CLIP's ResNets, SigLIP, CoCa), taken apart into tokens, pooling and value path.

The pool answers with its output projection of a weighted mean of the tokens' values. Local features are what it would
answer to one token alone: value and output projection (and what stands behind them), without the attention weights.
For CLIP's ResNets this is the path of MaskCLIP, LoCoOp and GL-MCM's released code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import AttentionalPooler, VisionTransformer
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

__all__ = ["PooledTower", "latent_value_path", "pooled_tower"]


@dataclass(frozen=True)
class PooledTower:
    """An image tower in three steps.

    Attributes:
        grid: patches (rows, columns).
        tokens: images [B, 3, H, W] -> what the pool reads, a map [B, D, h, w] or tokens [B, T, D].
        image: from there to the embedding [B, d].
        local: from there to local features [B, P, d] in row-major order, without class or register tokens.
    """

    grid: tuple[int, int]
    tokens: Callable[[Tensor], Tensor]
    image: Callable[[Tensor], Tensor]
    local: Callable[[Tensor], Tensor]


def pooled_tower(visual: nn.Module) -> PooledTower | None:
    """The steps of an open_clip image tower that pools with attention; None for any other tower."""
    if isinstance(visual, ModifiedResNet):
        return _resnet(visual)
    if isinstance(visual, TimmModel) and type(getattr(visual.trunk, "attn_pool", None)) is AttentionPoolLatent:
        return _timm(visual)
    if isinstance(visual, VisionTransformer) and _pools_once(visual):
        return _coca(visual)
    return None


def _pools_once(visual: Any) -> bool:
    """CoCa's pool as trained models have it; the paper's pair of pools is not taken apart."""
    return isinstance(visual.attn_pool, AttentionalPooler) and visual.attn_pool_contrastive is None


def latent_value_path(pool: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """What timm's pool with a latent query (SigLIP's head) answers to each token alone, [B, P, d].

    Args:
        pool: the head.
        tokens: normalised tokens [B, P, D] without class and register tokens.
    """
    half = pool.kv.weight.shape[0] // 2
    bias = None if pool.kv.bias is None else pool.kv.bias[half:]
    x = pool.proj(F.linear(tokens, pool.kv.weight[half:], bias))
    return x if pool.mlp is None else x + pool.mlp(pool.norm(x))


def _resnet(visual: Any) -> PooledTower:
    def tokens(x: Tensor) -> Tensor:
        x = visual.stem(x)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        return x

    def local(x: Tensor) -> Tensor:
        return visual.attnpool.c_proj(visual.attnpool.v_proj(x.flatten(2).transpose(1, 2)))

    size = visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return PooledTower((height // 32, width // 32), tokens, visual.attnpool, local)


def _timm(visual: Any) -> PooledTower:
    trunk = visual.trunk

    def image(x: Tensor) -> Tensor:
        return visual.head(trunk.forward_head(x))

    def local(x: Tensor) -> Tensor:
        x = x[:, trunk.num_prefix_tokens :]
        if trunk.attn_pool.pos_embed is not None:
            x = x + trunk.attn_pool.pos_embed[-x.shape[1] :]
        return visual.head(trunk.head(trunk.fc_norm(latent_value_path(trunk.attn_pool, x))))

    return PooledTower(tuple(trunk.patch_embed.grid_size), trunk.forward_features, image, local)


def _coca(visual: Any) -> PooledTower:
    def tokens(x: Tensor) -> Tensor:
        return visual.transformer(visual._embeds(x))

    def project(x: Tensor) -> Tensor:
        return x if visual.proj is None else x @ visual.proj

    def image(x: Tensor) -> Tensor:
        return project(visual._pool(x)[0])

    def local(x: Tensor) -> Tensor:
        pool: AttentionalPooler = visual.attn_pool
        return project(visual.ln_post(pool.attn.out_proj(F.linear(pool.ln_k(x[:, 1:]), *_value(pool.attn)))))

    return PooledTower(tuple(visual.grid_size), tokens, image, local)


def _value(attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor | None]:
    width = attention.embed_dim
    weight = attention.v_proj_weight if attention.in_proj_weight is None else attention.in_proj_weight[2 * width :]
    return weight, None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
