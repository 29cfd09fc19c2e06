"""Image models of the timm library: vision transformers, Swin, and any other network as features."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast
from urllib.parse import parse_qsl

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from ood_core.backbones.base import Backbone, BlockParts, Layer, identity
from ood_core.backbones.linear import NamedLinear, fused_qkv
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import MissingDataError, UsageError, unknown_name

__all__ = ["TimmBackbone", "image_transform", "load_timm"]

log = logging.getLogger(__name__)

# Pooling that keeps the width of a token, so that a patch lives in the space of the image embedding.
_POOLS = ("token", "avg", "avgmax", "max")


class TimmBackbone(Backbone):
    """Any timm model: plain vision transformers and Swin with everything, other networks with the image only.

    The image embedding is what the classifier reads (`forward_head(..., pre_logits=True)`); a local feature
    is the final norm of one token. A transformer whose head pools with attention (SigLIP's) has no local
    features.

    Args:
        model: a module made by `timm.create_model`.
        transform: the model's image transform, see `image_transform`.
        spec: name for messages and results.

    Raises:
        UsageError: a model without an image embedding (no pooling).
    """

    def __init__(self, model: nn.Module, transform: ImageTransform, *, spec: str = "timm") -> None:
        super().__init__(model, transform, spec=spec)
        self.network = cast(Any, model)
        self._swin = isinstance(model, SwinTransformer | SwinTransformerV2)
        capabilities = {"image"}
        if self._reads_tokens():
            capabilities |= {"local", "blocks"}
            size = self.network.layers[-1].output_resolution if self._swin else self.network.patch_embed.grid_size
            self.grid = tuple(size)
            self.width = self.network.num_features
            has_head = self.network.num_classes > 0
        else:
            self.width, has_head = self._probe()
        if has_head:
            capabilities.add("logits")
            names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
            self.label_names = list(names) if names and len(names) == self.network.num_classes else None
        self.capabilities = frozenset(capabilities)

    def _reads_tokens(self) -> bool:
        """Whether the blocks are understood and the head reads tokens that stand alone."""
        network = self.network
        if self._swin:
            return network.head.global_pool.pool_type == "avg"
        return _is_plain(network) and network.attn_pool is None and network.global_pool in _POOLS

    @torch.no_grad()
    def _probe(self) -> tuple[int, bool]:
        """Width of the embedding, and whether the classifier applied to it gives the model's logits."""
        features = self.network.forward_features(self._ramp())
        embedding = self.network.forward_head(features, pre_logits=True)
        if not isinstance(embedding, Tensor) or embedding.ndim != 2:
            raise UsageError(f"{self.spec!r} pools nothing, so it has no image embedding: set '?global_pool=avg'.")
        head = self.network.get_classifier()
        if not isinstance(head, nn.Linear) or embedding.shape[-1] != head.in_features:
            return embedding.shape[-1], False
        return embedding.shape[-1], torch.allclose(head(embedding), self.network.forward_head(features), atol=1e-4)

    def _ramp(self) -> Tensor:
        shape = (1, 3, *self.transform.crop)
        return torch.linspace(-1, 1, 3 * shape[2] * shape[3], device=self.device, dtype=self.dtype).view(shape)

    # ---- images

    def embed(self, x: Tensor) -> Tensor:
        """Input tokens of the first block, [B, T, D], for Swin [B, h, w, D]; else the image embedding."""
        network = self.network
        if "blocks" not in self.capabilities:
            return network.forward_head(network.forward_features(x), pre_logits=True)
        x = network.patch_embed(x)
        return x if self._swin else network.norm_pre(network.patch_drop(network._pos_embed(x)))

    def layers(self, tower: str = "visual", length: int | None = None) -> list[Layer]:
        """Blocks of a plain or Swin transformer whose head reads tokens."""
        if tower != "visual" or "blocks" not in self.capabilities:
            return []
        post_norm = isinstance(self.network, SwinTransformerV2)
        return [
            Layer(f"visual.{name}", block, _block_parts(block, post_norm), block, enter)
            for name, block, enter in self._blocks()
        ]

    @property
    def reads_class_token(self) -> bool:
        """Whether a plain transformer pools its class token."""
        return not self._swin and "blocks" in self.capabilities and self.network.global_pool == "token"

    @property
    def last_block(self) -> nn.Module:
        """The last transformer block."""
        self.require("blocks")
        return (self.network.layers[-1] if self._swin else self.network).blocks[-1]

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last block; some transformers have it behind the pooling."""
        self.require("blocks")
        behind_pooling = isinstance(self.network.norm, nn.Identity)
        return self.network.fc_norm if behind_pooling else self.network.norm

    def _image_embedding(self, tokens: Tensor) -> Tensor:
        if "blocks" not in self.capabilities:
            return tokens
        return self.network.forward_head(self.network.norm(tokens), pre_logits=True)

    def _local_embedding(self, tokens: Tensor) -> Tensor:
        if self._swin:
            return self.network.norm(tokens).flatten(1, 2)
        return self.network.fc_norm(self.network.norm(tokens[:, self.network.num_prefix_tokens :]))

    def _logits(self, embedding: Tensor) -> Tensor:
        return self.network.get_classifier()(embedding)

    # ---- weights

    def _linears(self) -> Iterator[NamedLinear]:
        for layer, block, _ in self._blocks():
            yield from self._named("visual", layer, _block_weights(block))

    def _blocks(self) -> Iterator[tuple[str, Any, Any]]:
        """Name of a layer, its block, and what lies before it."""
        if self._swin:
            for stage, layer in enumerate(self.network.layers):
                for index, block in enumerate(layer.blocks):
                    yield f"{stage}.{index}", block, identity if index else layer.downsample
        elif _is_plain(self.network):
            yield from ((str(index), block, identity) for index, block in enumerate(self.network.blocks))


def _is_plain(network: nn.Module) -> bool:
    """A vision transformer of ordinary sequential blocks (no parallel, rotary or distilled variants)."""
    return type(network) is VisionTransformer and all(
        type(block) is Block and type(block.attn) is Attention for block in network.blocks
    )


def _block_parts(block: Any, post_norm: bool) -> BlockParts:
    attention = block.attn

    def value(x: Tensor) -> Tensor:
        return _gated(attention, x, F.linear(x, *_value_weights(attention)))

    def scale(branch: int) -> Callable[[Tensor], Tensor]:
        """LayerScale, and stochastic depth, which does nothing but in training."""
        scale, drop = (getattr(block, f"{name}{branch}", identity) for name in ("ls", "drop_path"))
        return lambda x: drop(scale(x))

    return BlockParts(
        block.norm1,
        getattr(block, "_attn", attention),  # Swin's windows
        value,
        attention.proj,
        block.norm2,
        block.mlp,
        scale(1),
        scale(2),
        post_norm=post_norm,
    )


def _value_weights(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the value projection; Swin v2 keeps its bias apart from the fused projection."""
    start = attention.qkv.weight.shape[0] // 3 * 2
    bias = attention.qkv.bias
    bias = getattr(attention, "v_bias", None) if bias is None else bias[start:]
    return attention.qkv.weight[start:], bias


def _gated(attention: Any, x: Tensor, value: Tensor) -> Tensor:
    """What a few models do to the attention's result before the output projection (norm, gate)."""
    value = getattr(attention, "norm", identity)(value)
    gate = getattr(attention, "gate", None)
    return value if gate is None else value * gate(x).sigmoid()


def _block_weights(block: Any) -> dict[str, Any]:
    weights = fused_qkv(block.attn.qkv.weight) | {"out": block.attn.proj.weight}
    if hasattr(block.mlp, "fc1_x"):  # SwiGLU with separate gate
        up: Any = block.mlp.fc1_x.weight
    elif hasattr(block.mlp, "gate_last"):  # GluMlp packs gate and up-projection
        half = block.mlp.fc1.weight.shape[0] // 2
        up = (block.mlp.fc1.weight, slice(0, half) if block.mlp.gate_last else slice(half, 2 * half))
    else:
        up = block.mlp.fc1.weight
    return weights | {"up": up, "down": block.mlp.fc2.weight}


def image_transform(model: nn.Module) -> ImageTransform:
    """The evaluation transform that a timm model asks for, at the size the model was built for."""
    config = resolve_model_data_config(model)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    crop = tuple(built) if built else tuple(config["input_size"][1:])
    squash = config["crop_mode"] == "squash"
    return ImageTransform(
        crop=crop,
        resize=None if squash else int(max(crop) / config["crop_pct"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )


def load_timm(name: str, *, spec: str) -> TimmBackbone:
    """Load "NAME.TAG", "NAME" (random weights) or "local-dir:FOLDER" (safetensors, else weights only).

    A query sets arguments of `timm.create_model`: "NAME.TAG?img_size=224&num_classes=0";
    "img_size=224,448" is height and width.

    Raises:
        UsageError: an unknown model or tag with the nearest known ones, or arguments the model does not take.
        MissingDataError: weights that cannot be fetched or a folder that is not there.
    """
    name, _, query = name.partition("?")
    options = _options(query, spec)
    stored = name.startswith(("local-dir:", "hf-hub:"))
    architecture, _, tag = name.partition(".")
    if not stored:
        _check_names(architecture, tag)
        if not tag:
            log.warning("%s: no weights named, so they are random and scores mean nothing.", spec)
    try:
        model = timm.create_model(name, pretrained=stored or bool(tag), **options)
    except (TypeError, AssertionError) as error:
        raise UsageError(f"timm cannot build {spec!r}: {error}") from error
    except Exception as error:
        raise MissingDataError(
            f"The weights of {spec!r} could not be loaded ({type(error).__name__}: {str(error)[:200]}). "
            "Without a network use 'tiny', or a folder saved before: 'timm:local-dir:/path'."
        ) from error
    return TimmBackbone(model, image_transform(model), spec=spec)


def _options(query: str, spec: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise UsageError(f"{spec!r}: options are written '?img_size=224&num_classes=0', got {query!r}.") from error
    return {key: _option(text) for key, text in pairs}


def _option(text: str) -> Any:
    numbers = text.split(",")
    if all(number.removeprefix("-").isdecimal() for number in numbers):
        values = tuple(int(number) for number in numbers)
        return values if len(values) > 1 else values[0]
    return {"true": True, "false": False}.get(text.lower(), text)


def _check_names(architecture: str, tag: str) -> None:
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UsageError(f"Unknown timm model {architecture!r}.{hint} timm.list_models() gives all names.")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise unknown_name(f"weights for timm {architecture}", tag, tags or ["none"])
