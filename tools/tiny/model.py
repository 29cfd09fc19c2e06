"""The towers with plain-matmul attention, 1.8 times faster to train on a CPU than the fused one; the optimiser."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import timm.optim.muon
import torch
import torch.nn.functional as F
from ood_core.tiny import ResidualStem, TinyConfig, build_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tiny.recipe import Recipe


def attention(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    attn = block.attn
    count, tokens, width = x.shape
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).view(count, tokens, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5)
    scores = scores if mask is None else scores + mask
    return attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, width))


def run_block(block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = x + attention(block, block.ln_1(x), mask)
    return x + block.mlp(block.ln_2(x))


def value_block(block: nn.Module, x: Tensor) -> Tensor:
    width = x.shape[-1]
    attn = block.attn
    value = F.linear(block.ln_1(x), attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :])
    x = x + attn.out_proj(value)
    return x + block.mlp(block.ln_2(x))


def image_features(visual: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit image [B, d] and value-path patch features [B, P, d], at any input size."""
    x = visual.conv1(x)
    grid = x.shape[-2:]
    position = visual.positional_embedding
    if grid != visual.grid_size:
        table = position[1:].T.reshape(1, -1, *visual.grid_size)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        position = torch.cat([position[:1], table.flatten(2)[0].T])
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = visual.ln_pre(x + position)
    *lower, last = visual.transformer.resblocks
    for block in lower:
        x = run_block(block, x)
    image = visual.ln_post(run_block(last, x)[:, 0]) @ visual.proj
    local = visual.ln_post(value_block(last, x[:, 1:])) @ visual.proj
    return F.normalize(image.float(), dim=-1), F.normalize(local.float(), dim=-1)


def text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    length = int(tokens.argmax(-1).max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
    for block in model.transformer.resblocks:
        x = run_block(block, x, mask)
    x = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


class Trainee(nn.Module):
    """The CLIP in training form plus the learned class matrix."""

    def __init__(self, config: TinyConfig, classes: int, logit_scale: float) -> None:
        super().__init__()
        self.clip = build_model(config, norm=True)
        nn.init.constant_(self.clip.logit_scale, math.log(logit_scale))
        visual = self.clip.visual
        for block in (*visual.transformer.resblocks, *self.clip.transformer.resblocks):
            nn.init.zeros_(block.mlp.c_proj.weight)
        self.classes = nn.Parameter(torch.randn(classes, config.embed_dim) * 0.02)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def continue_from(self, weights: Path, images: Tensor, texts: Tensor) -> None:
        """Take up finished weights: the same function of the images [N, 3, H, W] as the one that was exported.

        Export folded the stem's batch norms, so new ones start at the statistics of `images`, with the scale and
        shift that undo them. The class matrix was not exported: it starts at the class texts [T, C, L] it had taught.
        """
        state = {name: value.float() for name, value in load_file(weights).items()}
        stem = ResidualStem(self.clip.visual.conv1.channels)
        stem.load_state_dict({k.removeprefix("visual.conv1."): state.pop(k) for k in list(state) if "conv1." in k})
        missing, unexpected = self.clip.load_state_dict(state, strict=False)
        if unexpected or any("conv1" not in name for name in missing):
            raise SystemExit(f"{weights} holds other layers: {[*missing, *unexpected][:4]}.")
        self.clip.visual.conv1.unfold(stem, images)
        names = torch.stack([text_features(self.clip, tokens) for tokens in texts]).mean(0)
        self.classes.copy_(F.normalize(names, dim=-1))


def build_optimizer(model: Trainee, recipe: Recipe, precision: torch.dtype) -> timm.optim.muon.Muon:
    """Muon on matrices and convolutions of the towers, AdamW on the rest."""
    rest_names = ("embedding", "classes", "proj", "text_projection", "logit_scale")
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        single = parameter.ndim < 2 or name.endswith(rest_names) or "embedding" in name
        (rest if single else matrices).append(parameter)
    # Its orthogonalisation computes in bfloat16, which is 50 times slower where the processor emulates it.
    orthogonalise = timm.optim.muon.zeropower_via_newtonschulz
    timm.optim.muon.zeropower_via_newtonschulz = functools.partial(orthogonalise, dtype=precision)
    return timm.optim.muon.Muon(
        [
            {"params": matrices, "lr": recipe.muon_lr, "use_fallback": False},
            {"params": rest, "lr": recipe.adamw_lr, "use_fallback": True, "weight_decay": 0.0},
        ],
        lr=recipe.muon_lr,
        momentum=0.95,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="original",
    )
