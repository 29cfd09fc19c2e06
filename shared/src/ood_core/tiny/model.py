"""Architecture and loading of the embedded backbone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the embedded backbone (`config.json` beside the weights holds the shipped ones)."""

    image_size: int = 64
    patch_size: int = 8
    width: int = 192
    layers: int = 4
    heads: int = 3
    embed_dim: int = 192
    stem: tuple[int, int] = (48, 96)
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 3
    context_length: int = 77


class ResidualStem(nn.Module):
    """Convolutional patch embedding: three stages, each halving the grid and adding one residual block.

    Takes [B, 3, H, W], gives [B, width, H/8, W/8]. `norm=True` is the training form with batch norms, which
    `folded` turns into the shipped form without any.
    """

    def __init__(self, channels: tuple[int, ...], *, norm: bool = False) -> None:
        super().__init__()
        self.channels = channels
        ins = (3, *channels[:-1])
        self.down = nn.ModuleList(_conv(i, o, 2, norm) for i, o in zip(ins, channels, strict=True))
        self.first = nn.ModuleList(_conv(c, c, 1, norm) for c in channels)
        self.second = nn.ModuleList(_conv(c, c, 1, norm) for c in channels)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches of `x`."""
        for down, first, second in zip(self.down, self.first, self.second, strict=True):
            x = self.act(down(x))
            x = self.act(x + second(self.act(first(x))))
        return x

    def folded(self) -> ResidualStem:
        """The same function in evaluation mode, with every batch norm merged into its convolution."""
        plain = ResidualStem(self.channels)
        for (conv, batch_norm), target in zip(self._convolutions(), plain._convolutions(), strict=True):
            fused = nn.utils.fuse_conv_bn_eval(conv.eval(), batch_norm.eval())
            target.load_state_dict(fused.state_dict())
        return plain

    @torch.no_grad()
    def unfold(self, plain: ResidualStem, x: Tensor) -> None:
        """Undo `folded`: become the same function as `plain`, with batch norms at the statistics of `x`."""
        hooks = []
        for (conv, batch_norm), source in zip(self._convolutions(), plain._convolutions(), strict=True):
            conv.weight.copy_(source.weight)

            def start(_: nn.Module, __: Any, out: Tensor, norm: Any = batch_norm, bias: Tensor = source.bias) -> None:
                variance, mean = torch.var_mean(out, (0, 2, 3), correction=0)
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
                norm.weight.copy_((variance + norm.eps).sqrt())
                norm.bias.copy_(bias + mean)

            hooks.append(conv.register_forward_hook(start))
        self.eval()(x)
        for hook in hooks:
            hook.remove()
        self.train()

    def _convolutions(self) -> list[Any]:
        return [*self.down, *self.first, *self.second]


def _conv(ins: int, outs: int, stride: int, norm: bool) -> nn.Module:
    if not norm:
        return nn.Conv2d(ins, outs, 3, stride, 1)
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs))


def build_model(config: TinyConfig | None = None, *, norm: bool = False) -> open_clip.CLIP:
    """A randomly initialised model of the embedded architecture (`norm=True`: the stem's training form)."""
    config = config or TinyConfig()
    model = open_clip.CLIP(
        config.embed_dim,
        CLIPVisionCfg(
            layers=config.layers,
            width=config.width,
            head_width=config.width // config.heads,
            patch_size=config.patch_size,
            image_size=config.image_size,
        ),
        CLIPTextCfg(
            context_length=config.context_length,
            vocab_size=259,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
        ),
    )
    model.visual.conv1 = ResidualStem((*config.stem, config.width), norm=norm)
    return model


def load_model(folder: Path | None = None) -> open_clip.CLIP:
    """The model with its trained weights (the shipped ones, or those in `folder`), float32, in evaluation mode."""
    source = folder or resources.files("ood_core.tiny")
    config = json.loads((source / "config.json").read_text())
    model = build_model(TinyConfig(**{**config["model"], "stem": tuple(config["model"]["stem"])}))
    with resources.as_file(source / "model.safetensors") as path:
        model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval()


MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
