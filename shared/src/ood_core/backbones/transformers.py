"""Models of the transformers library: CLIP, SigLIP, ViT, DINOv2 (with and without registers), DINOv3, Swin v2."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ood_core.backbones.base import Backbone, BlockParts, Decision, Layer, identity
from ood_core.backbones.linear import KINDS, NamedLinear
from ood_core.backbones.loading import activation_name, as_channels, transform_decisions, unwrapped
from ood_core.backbones.transform import CLIP_MEAN, CLIP_STD, ImageTransform
from ood_core.errors import DataError, MissingDataError, UsageError

try:
    import transformers
except ImportError as error:
    raise UsageError(
        "Backbones 'hf:...' need the transformers library: pip install 'ood-core[transformers]'"
    ) from error

__all__ = ["TransformersBackbone", "image_transform", "load_transformers"]

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


class TransformersBackbone(Backbone):
    """A transformers model of a supported architecture (`SUPPORTED`).

    The image embedding is CLIP's projected class token, the class token behind the final norm (ViT, DINOv2, DINOv3),
    the mean of all cells behind it (Swin v2), SigLIP's attention pool, or what a DINOv2 classifier reads: class token
    and mean patch, side by side. That head cannot read a single patch, so DINOv2 classifiers have no local features.

    SigLIP's local features are the pool's answer to one patch alone (value and output projection, residual MLP): the
    pooled embedding is a convex combination of those values, and nothing else leads from a patch to the space of the
    texts. Its text tower reads the whole padded text, in lower case. The model was trained with a sigmoid of
    `logit_scale` * cosine + `logit_bias` for every pair of image and text alone; see the guide for what that means for
    softmax scores. SigLIP 2 with variable grids (NaFlex) reads images at its one square grid.

    Args:
        model: a module of one of the supported classes, also compiled or in `DataParallel`.
        transform: the model's image transform, see `image_transform`.
        tokenizer: a transformers tokenizer, for CLIP and SigLIP; without it the backbone has no text.
        spec: name for messages and results.

    Raises:
        UsageError: a model of another class, without pooling, or for neither colour nor grey images.
    """

    def __init__(self, model: nn.Module, transform: ImageTransform, *, tokenizer: Any = None, spec: str = "hf") -> None:
        model = unwrapped(model)
        super().__init__(model, transform, spec=spec)
        name = type(model).__name__
        if name not in SUPPORTED:
            raise _unsupported(spec, name)
        self.network = cast(Any, model)
        self.channels = getattr(_vision(self.network.config), "num_channels", 3)
        if self.channels not in (1, 3):
            raise UsageError(f"{spec!r} reads {self.channels} channels; images have 3, or 1 for grey.")
        self.tokenizer = tokenizer
        self.tower = SUPPORTED[name](model, transform.crop)
        self.grid = self.tower.grid
        self.width = self.tower.width
        self.classifier = cast(Any, getattr(model, "classifier", None))
        capabilities = {"image", "blocks"}
        if not self.tower.reads_mean_patch:
            capabilities.add("local")
        if isinstance(self.classifier, nn.Linear):
            capabilities.add("logits")
            self.label_names = _label_names(self.network.config)
        if name in _TEXT_TOWERS:
            self.logit_scale = float(self.network.logit_scale.exp())
            self.logit_bias = float(getattr(self.network, "logit_bias", 0.0))
            if tokenizer is not None:
                # SigLIP's text tower is bidirectional: a learned prompt has no end that it could be read at.
                capabilities |= {"text", "prompts"} if name == "CLIPModel" else {"text"}
                self.context_length = self.network.config.text_config.max_position_embeddings
        if name == "CLIPModel":
            self.width = self.network.config.projection_dim
        self.capabilities = frozenset(capabilities)

    def _twin(self, model: nn.Module) -> Self:
        return type(self)(model, self.transform, tokenizer=self.tokenizer, spec=self.spec)

    # ---- images

    def embed(self, x: Tensor) -> Tensor:
        """Input tokens of the first block, [B, T, D] or for Swin [B, h, w, D]."""
        return self.tower.embed(as_channels(x, self.channels))

    def layers(self, tower: str = "visual", length: int | None = None) -> list[Layer]:
        """Blocks of the image tower, or of CLIP's text tower."""
        if tower == "visual":
            return list(self.tower.blocks())
        if "prompts" not in self.capabilities:
            return []
        # As long as the longest text unless told otherwise; the mask lets no token see what comes behind it.
        length = length or self.context_length
        mask = torch.full((length, length), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device).triu(1)
        blocks = enumerate(self.network.text_model.encoder.layers)
        return [
            _plain_layer(f"text.{index}", block, _CLIP, {"attention_mask": mask[None, None]}) for index, block in blocks
        ]

    @property
    def reads_class_token(self) -> bool:
        """Whether the image embedding is of the class token."""
        return self.tower.reads_class_token

    @property
    def pools_by_attention(self) -> bool:
        """Whether the image embedding is SigLIP's attention pool."""
        return self.tower.pools_by_attention

    @property
    def last_block(self) -> nn.Module:
        """The last transformer block as a function of tokens; its `layer` is the library's own module."""
        return self.tower.last

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last block."""
        return self.tower.norm

    def image_embedding(self, tokens: Tensor) -> Tensor:
        return self.project(self.tower.image(tokens))

    def local_embedding(self, tokens: Tensor) -> Tensor:
        return self.project(self.tower.local(tokens))

    def pool_values(self, tokens: Tensor) -> Tensor:
        return self.local_embedding(tokens)

    def project(self, x: Tensor) -> Tensor:
        return getattr(self.network, "visual_projection", identity)(x)

    def save(self, folder: str | Path) -> str:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        return f"Saved: load it as 'hf:{folder}' (its image size and normalisation are the library's defaults)."

    def logits(self, embedding: Tensor) -> Tensor:
        return self.classifier(embedding)

    # ---- texts

    def tokenize(self, texts: list[str]) -> Tensor:
        if self.pools_by_attention:  # trained on lower case; not every tokenizer published with it knows
            texts = [text.lower() for text in texts]
        return self.tokenizer(
            texts, padding="max_length", max_length=self.context_length, truncation=True, return_tensors="pt"
        )["input_ids"]

    def _encode_text_chunk(self, texts: list[str]) -> Tensor:
        if "prompts" in self.capabilities:
            return super()._encode_text_chunk(texts)
        # A bidirectional tower reads the padding, too: nothing can be cut.
        return self.network.text_model(self.tokenize(texts).to(self.device)).pooler_output.float()

    def end_positions(self, ids: Tensor) -> Tensor:
        end = self.network.text_model.config.eos_token_id
        # Configurations older than the vocabulary's own end mark say 2; the mark is then the largest id.
        return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.network.text_model.embeddings.token_embedding(ids)

    def add_positions(self, embeddings: Tensor) -> Tensor:
        positions = self.network.text_model.embeddings.position_embedding.weight
        return embeddings + positions[: embeddings.shape[1]]

    def text_norm(self, hidden: Tensor) -> Tensor:
        return self.network.text_model.final_layer_norm(hidden)

    def project_text(self, hidden: Tensor) -> Tensor:
        return self.network.text_projection(hidden)

    @property
    def text_projection(self) -> Tensor:
        """The last linear map of the text tower, [D, d]."""
        return self.network.text_projection.weight.T

    # ---- weights

    def _linears(self) -> Iterator[NamedLinear]:
        for layer, weights in self.tower.weights():
            yield from self._named("visual", layer, weights)
        if type(self.network).__name__ not in _TEXT_TOWERS:
            return
        for index, block in enumerate(self.network.text_model.encoder.layers):
            yield from self._named("text", str(index), _plain_weights(block, _CLIP))
        for name, place in _TEXT_TOWERS[type(self.network).__name__].items():
            weight = self.network.get_submodule(place).weight
            yield NamedLinear(name, weight, on_change=self._record_edit)


# Models with a text tower, and where they keep their projections.
_TEXT_TOWERS = {
    "CLIPModel": {"visual.projection": "visual_projection", "text.projection": "text_projection"},
    "SiglipModel": {"text.projection": "text_model.head"},
    "Siglip2Model": {"text.projection": "text_model.head"},
}


# ---- image towers


class _Tower(ABC):
    """How one family of image towers is laid out."""

    grid: tuple[int, int]
    width: int
    class_tokens = 0
    registers = 0
    last: _TokenBlock
    norm: nn.Module
    reads_class_token = True
    reads_mean_patch = False
    pools_by_attention = False

    @abstractmethod
    def __init__(self, model: Any, crop: tuple[int, int]) -> None: ...

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Input tokens of the first block."""

    @abstractmethod
    def blocks(self) -> Iterator[Layer]:
        """The blocks, bottom first."""

    @abstractmethod
    def image(self, tokens: Tensor) -> Tensor:
        """[B, D] from the tokens behind the last block."""

    @abstractmethod
    def local(self, tokens: Tensor) -> Tensor:
        """[B, P, D] from tokens behind the last block."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name of a layer and its weights by kind, bottom layer first."""


class _TokenBlock(nn.Module):
    """A library's block called with tokens only; `options` gives what else it takes."""

    def __init__(self, layer: nn.Module, options: Callable[[], dict[str, Any]] = dict) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, **_UNMASKED | self.options())


_UNMASKED: dict[str, Any] = {"attention_mask": None}


class _SwinBlock(_TokenBlock):
    """A Swin block called with tokens [B, h, w, D]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens.flatten(1, 2), tokens.shape[1:3])[0].view_as(tokens)


@dataclass(frozen=True)
class _Names:
    """Where a family keeps the pieces that all plain transformers have."""

    layers: str
    norm1: str
    attention: str
    out: str
    norm2: str
    final: str
    scales: tuple[str, str] | None = None
    resizes: bool = True  # whether the embedding is told to interpolate its positions


_CLIP = _Names(
    "vision_model.encoder.layers",
    "layer_norm1",
    "self_attn",
    "out_proj",
    "layer_norm2",
    "vision_model.post_layernorm",
)
_SIGLIP = _CLIP
_VIT = _Names("layers", "layernorm_before", "attention", "o_proj", "layernorm_after", "layernorm")
_DINO = _Names(
    "encoder.layer",
    "norm1",
    "attention",
    "o_proj",
    "norm2",
    "layernorm",
    scales=("layer_scale1", "layer_scale2"),
    resizes=False,
)
_DINO3 = replace(_DINO, layers="model.layer", final="norm")


class _PlainTower(_Tower):
    """Class token, perhaps registers, patches; pre-norm blocks."""

    names: _Names
    wrapped = True  # whether a classifier may hold the model as its `base_model`
    class_tokens = 1

    def __init__(self, model: Any, crop: tuple[int, int]) -> None:
        base = model.base_model if self.wrapped else model
        self._embed = self._embedding(base, crop)
        self.layers = base.get_submodule(self.names.layers)
        self.norm = base.get_submodule(self.names.final)
        self.last = _TokenBlock(self.layers[-1], self.options)
        config = _vision(model.config)
        self.registers = getattr(config, "num_register_tokens", 0)
        self.skip = self.class_tokens + self.registers
        patch = _pair(config.patch_size)
        self.grid = (crop[0] // patch[0], crop[1] // patch[1])
        self.width = config.hidden_size * (2 if self.reads_mean_patch else 1)

    def _embedding(self, base: Any, crop: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        if not self.names.resizes:  # DINOv2 does it unasked
            return base.embeddings
        resized = _pair(base.config.image_size) != tuple(crop)
        return lambda x: base.embeddings(x, interpolate_pos_encoding=resized)

    def embed(self, x: Tensor) -> Tensor:
        return self._embed(x)

    def options(self) -> dict[str, Any]:
        """What blocks take besides tokens."""
        return {}

    def blocks(self) -> Iterator[Layer]:
        options = self.options()
        for index, block in enumerate(self.layers):
            yield _plain_layer(f"visual.{index}", block, self.names, options)

    def image(self, tokens: Tensor) -> Tensor:
        if not self.reads_mean_patch:
            return self.norm(tokens[:, 0])
        tokens = self.norm(tokens)
        return torch.cat([tokens[:, 0], tokens[:, self.skip :].mean(1)], -1)

    def local(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens[:, self.skip :])

    def weights(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, block in enumerate(self.layers):
            yield str(index), _plain_weights(block, self.names)


class _CLIPTower(_PlainTower):
    names = _CLIP
    wrapped = False

    def _embedding(self, base: Any, crop: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        vision = base.vision_model
        embed = super()._embedding(vision, crop)
        return lambda x: vision.pre_layrnorm(embed(x))


class _SiglipTower(_PlainTower):
    """No class token; a learned query attends to the patches behind the final norm."""

    names = _SIGLIP
    wrapped = False
    class_tokens = 0
    reads_class_token = False
    pools_by_attention = True

    def __init__(self, model: Any, crop: tuple[int, int]) -> None:
        super().__init__(model, crop)
        self.head = getattr(model.vision_model, "head", None)
        if self.head is None:
            raise UsageError("A SigLIP without its pooling head (vision_use_head = false) has no image embedding.")

    def _embedding(self, base: Any, crop: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        return super()._embedding(base.vision_model, crop)

    def image(self, tokens: Tensor) -> Tensor:
        return cast(Any, self.head)(self.norm(tokens))

    def local(self, tokens: Tensor) -> Tensor:
        head = cast(Any, self.head)
        pool, width = head.attention, tokens.shape[-1]
        value = F.linear(self.norm(tokens), pool.in_proj_weight[2 * width :], pool.in_proj_bias[2 * width :])
        pooled = pool.out_proj(value)
        return pooled + head.mlp(head.layernorm(pooled))


class _Siglip2Tower(_SiglipTower):
    """The tower for variable grids (NaFlex), fed with patches of one grid."""

    def _embedding(self, base: Any, crop: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        side = base.config.vision_config.patch_size
        grid = torch.tensor([[crop[0] // side, crop[1] // side]])

        def embed(x: Tensor) -> Tensor:
            patches = F.unfold(x, side, stride=side).transpose(1, 2)  # [B, P, 3 s s], channels first
            patches = patches.unflatten(-1, (x.shape[1], side * side)).transpose(-1, -2).flatten(-2)
            return base.vision_model.embeddings(patches, grid.expand(len(x), -1))

        return embed


class _ViTTower(_PlainTower):
    names = _VIT


class _DinoTower(_PlainTower):
    names = _DINO


class _Dino3Tower(_DinoTower):
    """Rotary positions, which turn the queries and keys of patches alone."""

    names = _DINO3
    wrapped = False

    def __init__(self, model: Any, crop: tuple[int, int]) -> None:
        self.rope: Any = model.rope_embeddings
        self.crop = crop
        super().__init__(model, crop)

    def options(self) -> dict[str, Any]:
        """Rotary positions (cosine, sine) of the grid, in the precision of the weights."""
        rope, weight = self.rope, cast(Any, self.norm).weight
        if torch.finfo(rope.inv_freq.dtype).bits < 32:  # frequencies must not be rounded with the weights
            steps = torch.arange(0, 1, 4 / rope.head_dim, dtype=torch.float32)
            rope.inv_freq = (1 / rope.base**steps).to(weight.device)
        return {"position_embeddings": rope(weight.new_empty(()).expand(1, 3, *self.crop))}


class _DinoClassifierTower(_DinoTower):
    reads_class_token = False
    reads_mean_patch = True


class _SwinTower(_Tower):
    """Swin v2: stages of windowed blocks, norms behind attention and MLP."""

    reads_class_token = False

    def __init__(self, model: Any, crop: tuple[int, int]) -> None:
        self.base = model.base_model
        self.stages = self.base.encoder.layers
        self.last = _SwinBlock(self.stages[-1].blocks[-1])
        self.norm = self.base.layernorm
        self.width = self.base.num_features
        patch, halvings = _pair(self.base.config.patch_size), len(self.stages) - 1
        rows, columns = (-(-side // step) for side, step in zip(crop, patch, strict=True))
        for _ in range(halvings):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        self.grid = (rows, columns)

    def embed(self, x: Tensor) -> Tensor:
        x, size = self.base.embeddings(x)
        return x.unflatten(1, size)

    def blocks(self) -> Iterator[Layer]:
        merge: Callable[[Tensor], Tensor] = identity
        for stage, layer in enumerate(self.stages):
            for index, block in enumerate(layer.blocks):
                enter = identity if index else merge
                yield Layer(f"visual.{stage}.{index}", _SwinBlock(block), _swin_parts(block), block, enter)
            merge = partial(_merge_patches, layer.downsample)

    def image(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens).flatten(1, 2).mean(1)

    def local(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens).flatten(1, 2)

    def weights(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for stage, layer in enumerate(self.stages):
            for index, block in enumerate(layer.blocks):
                attention = block.attention
                modules = (
                    attention.self.query,
                    attention.self.key,
                    attention.self.value,
                    attention.output.dense,
                    block.intermediate.dense,
                    block.output.dense,
                )
                kinds = zip(KINDS[:6], modules, strict=True)
                yield f"{stage}.{index}", {kind: module.weight for kind, module in kinds}


SUPPORTED: dict[str, type[_Tower]] = {
    "CLIPModel": _CLIPTower,
    "ViTModel": _ViTTower,
    "ViTForImageClassification": _ViTTower,
    "Dinov2Model": _DinoTower,
    "Dinov2WithRegistersModel": _DinoTower,
    "Dinov2ForImageClassification": _DinoClassifierTower,
    "Dinov2WithRegistersForImageClassification": _DinoClassifierTower,
    "DINOv3ViTModel": _Dino3Tower,
    "Swinv2Model": _SwinTower,
    "Swinv2ForImageClassification": _SwinTower,
    "SiglipModel": _SiglipTower,
    "Siglip2Model": _Siglip2Tower,
}


def _plain_layer(name: str, block: Any, names: _Names, options: dict[str, Any]) -> Layer:
    attention, options = getattr(block, names.attention), _UNMASKED | options
    drop = getattr(block, "drop_path", identity)  # stochastic depth, which does nothing but in training
    scale1, scale2 = (_then(getattr(block, scale), drop) for scale in names.scales) if names.scales else (drop, drop)
    parts = BlockParts(
        getattr(block, names.norm1),
        lambda x: attention(x, **options)[0],
        attention.v_proj,
        getattr(attention, names.out),
        getattr(block, names.norm2),
        block.mlp,
        scale1,
        scale2,
    )
    return Layer(name, lambda x: block(x, **options), parts, block)


def _then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _swin_parts(block: Any) -> BlockParts:
    def attention(x: Tensor) -> Tensor:
        """What the block's first norm receives: the library has no function for its attention alone."""
        found: list[Tensor] = []
        hook = block.layernorm_before.register_forward_pre_hook(lambda _, received: found.append(received[0]))
        try:
            _SwinBlock(block)(x)
        finally:
            hook.remove()
        return found[0].view_as(x)

    inner = block.attention
    return BlockParts(
        block.layernorm_before,
        attention,
        inner.self.value,
        inner.output.dense,
        block.layernorm_after,
        lambda x: block.output(block.intermediate(x)),
        block.drop_path,
        block.drop_path,
        post_norm=True,
    )


def _merge_patches(downsample: Any, x: Tensor) -> Tensor:
    """Swin's step between stages: [B, h, w, D] to [B, h / 2, w / 2, 2 D], odd sides rounded up."""
    rows, columns = x.shape[1:3]
    return downsample(x.flatten(1, 2), (rows, columns)).unflatten(1, ((rows + 1) // 2, (columns + 1) // 2))


def _plain_weights(block: Any, names: _Names) -> dict[str, Any]:
    attention = getattr(block, names.attention)
    gated = hasattr(block.mlp, "up_proj")  # SwiGLU of the giant DINOv2; DINOv3's names for any MLP
    modules = (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        getattr(attention, names.out),
        block.mlp.up_proj if gated else block.mlp.fc1,
        block.mlp.down_proj if gated else block.mlp.fc2,
    )
    return {kind: module.weight for kind, module in zip(KINDS[:6], modules, strict=True)}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _vision(config: Any) -> Any:
    """The part of a configuration that is about images."""
    return getattr(config, "vision_config", config)


def _label_names(config: Any) -> list[str] | None:
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    return None if all(name.startswith("LABEL_") for name in names) else names


# ---- loading


def image_transform(config: dict[str, Any], model_config: Any) -> ImageTransform:
    """The transform that an image processor's configuration describes; what it does not say is its class's default.

    Args:
        config: contents of `preprocessor_config.json`; empty: the model's image size, usual normalisation.
        model_config: the model's configuration.

    Raises:
        UsageError: a processor that gives images of several sizes.
    """
    config = _with_defaults(config)
    size = _image_size(model_config)
    if hasattr(_vision(model_config), "num_patches"):  # SigLIP 2's processor cuts images into as many patches as fit
        crop, resize, fit = size, None, "cover"
    else:
        crop, resize, fit = _sizes(config, size)
    mean, std = _normalisation(config, model_config)
    if getattr(_vision(model_config), "num_channels", 3) == 1 and len(mean) > 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return ImageTransform(
        crop=crop,
        resize=resize,
        mean=mean,
        std=std,
        interpolation=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)).name.lower(),
        fit=fit,
    )


_OPTIONS = (
    *("size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "resample", "default_to_square"),
)


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What the file says, and the defaults of the class it names, as the library fills them in."""
    said = {key: value for key, value in config.items() if value is not None}
    name = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
    kind = getattr(transformers, name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast"), None)
    defaults = {key: getattr(kind, key, None) for key in _OPTIONS} if name else {}
    return {key: value for key, value in defaults.items() if value is not None} | said


def _image_size(model_config: Any) -> tuple[int, int]:
    vision = _vision(model_config)
    if hasattr(vision, "num_patches"):
        side = round(vision.num_patches**0.5) * vision.patch_size
        return side, side
    return _pair(vision.image_size)


# Normalisation that models were trained with, where no file says so.
_USUAL = {"clip": (CLIP_MEAN, CLIP_STD), "siglip": (HALF, HALF), "siglip2": (HALF, HALF), "vit": (HALF, HALF)}


def _normalisation(config: dict[str, Any], model_config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of pixel values in [0, 1] that have the effect of the processor's rescaling and normalisation."""
    usual = _USUAL.get(model_config.model_type, (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = config.get("image_mean") or usual[0], config.get("image_std") or usual[1]
    if not config.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    # (pixel * factor - mean) / std, for pixels 0 to 255; usually the factor is 1 / 255.
    factor = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
    return tuple(m if factor == 1 else m / factor for m in _three(mean)), tuple(
        s if factor == 1 else s / factor for s in _three(std)
    )


def _three(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(float(value) for value in values)


def _sizes(config: dict[str, Any], default: tuple[int, int]) -> tuple[tuple[int, int], Any, str]:
    """Crop, what is resized to before it, and how an image meets that."""
    size = config.get("size") or {"shortest_edge": max(default)}
    cropped = config.get("do_center_crop", "crop_size" in config or "size" not in config)
    if isinstance(size, int):
        square = config.get("default_to_square", not cropped)
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    crop = config.get("crop_size", default)
    crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else _pair(crop)
    if not config.get("do_resize", True):
        return (crop if cropped else default), None, "none"
    if "shortest_edge" in size:
        return (crop if cropped else default), size["shortest_edge"], "cover"
    if "height" not in size or "width" not in size:
        raise UsageError(
            f"The image processor's size {size} gives images of many sizes: set size to a height and width, or to a "
            "shortest_edge with a crop_size, in its preprocessor_config.json."
        )
    squashed = (int(size["height"]), int(size["width"]))
    return (crop, squashed, "squash") if cropped and crop != squashed else (squashed, None, "cover")


def load_transformers(name: str, *, spec: str) -> TransformersBackbone:
    """Load a model by its name on the Hugging Face hub or from a folder, with its transform and tokenizer.

    Weights are read from safetensors, or from a checkpoint restricted to tensors; no remote code is run.

    Raises:
        UsageError: an architecture that is not supported; the message names those that are.
        MissingDataError: files that cannot be fetched, a folder that is not there, or weights that are incomplete.
        DataError: weights that do not belong to the configuration beside them; the message names what does not fit.
    """
    config = _fetch(spec, transformers.AutoConfig.from_pretrained, name)
    architecture = (config.architectures or [""])[0] or _DEFAULTS.get(config.model_type, config.model_type)
    if architecture not in SUPPORTED:
        raise _unsupported(spec, architecture)
    options = {"add_pooling_layer": False} if architecture == "ViTModel" else {}
    model, report = _fetch(
        spec,
        getattr(transformers, architecture).from_pretrained,
        name,
        weights_only=True,
        dtype=torch.float32,
        attn_implementation=None if architecture.startswith("Swin") else "sdpa",
        output_loading_info=True,
        **options,
    )
    _check_report(report, spec)
    texts = architecture in _TEXT_TOWERS
    tokenizer = _fetch(spec, transformers.AutoTokenizer.from_pretrained, name) if texts else None
    processor = _processor_config(name, spec)
    if architecture == "Siglip2Model":
        log.warning("%s was trained on grids of many shapes: here every image is squeezed into its square one.", spec)
    backbone = TransformersBackbone(model, image_transform(processor, config), tokenizer=tokenizer, spec=spec)
    backbone.decisions = _decisions(backbone, architecture, bool(processor))
    return backbone


_DEFAULTS = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "swinv2": "Swinv2Model",
}

# What files may hold besides the network: constants that are computed, and the pooler of ViT that is not read.
_LEFT_OUT = ("position_ids", "inv_freq", "pooler.dense.weight", "pooler.dense.bias")


def _check_report(report: dict[str, Any], spec: str) -> None:
    """Refuse weights that lack something, or hold what this network has no place for."""
    if missing := sorted(report["missing_keys"]):
        raise MissingDataError(
            f"The weights of {spec!r} are incomplete: {', '.join(missing[:4])}{_more(missing)} missing, which "
            "would stay random. Take the complete files, or put right config.json, which names the architecture."
        )
    extra = sorted(key for key in report["unexpected_keys"] if not key.endswith(_LEFT_OUT))
    if extra:
        raise DataError(
            f"The weights of {spec!r} are not of the architecture in its config.json: {', '.join(extra[:4])}"
            f"{_more(extra)} would not be used. Put config.json right, or save the weights without them."
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 4} others" if len(names) > 4 else ""


def _processor_config(name: str, spec: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError as error:
        if (Path(name) / "preprocessor_config.json").is_file():
            raise DataError(f"{Path(name) / 'preprocessor_config.json'} cannot be read: {str(error)[:200]}") from error
        log.warning("%s has no preprocessor_config.json: its image size and the usual mean and std are used.", spec)
        return {}


def _fetch(spec: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    try:
        return load(name, trust_remote_code=False, **options)
    except ImportError as error:  # transformers names the packages that a tokenizer needs
        said = " ".join(str(error).split())
        raise UsageError(
            f"{spec!r} needs another package: {said[:200]} (SigLIP's tokenizer: pip install sentencepiece protobuf)"
        ) from error
    except RuntimeError as error:
        if "size" not in str(error):
            raise _not_loaded(spec, error) from error
        said = " ".join(str(error).split())
        raise DataError(
            f"The weights of {spec!r} have other shapes than its config.json says: {said[:300]}. Put config.json right."
        ) from error
    except ValueError as error:  # an architecture this version does not know, or one that wants its own code run
        raise UsageError(f"{spec!r} cannot be used: {str(error)[:200]} {_supported()}") from error
    except Exception as error:
        raise _not_loaded(spec, error) from error


def _not_loaded(spec: str, error: Exception) -> MissingDataError:
    return MissingDataError(
        f"The files of {spec!r} could not be loaded ({type(error).__name__}: {str(error)[:200]}). "
        "Without a network use 'tiny', or a folder saved before: 'hf:/path'."
    )


def _unsupported(spec: str, architecture: str) -> UsageError:
    return UsageError(f"{spec!r} is a {architecture or 'model without architecture'}. {_supported()}")


def _supported() -> str:
    return f"Supported: {', '.join(SUPPORTED)}; other libraries: 'open_clip:NAME/TAG', 'timm:NAME'."


# ---- what was decided


def _decisions(backbone: TransformersBackbone, architecture: str, processor: bool) -> tuple[Decision, ...]:
    config, vision = backbone.network.config, _vision(backbone.network.config)
    tower = backbone.tower
    rest = "preprocessor_config.json" if processor else "the usual of the architecture"
    pooling = "attention" if tower.pools_by_attention else "class token" if tower.reads_class_token else "mean"
    pooling = "class token and mean patch" if tower.reads_mean_patch else pooling
    activation = getattr(vision, "hidden_act", "") or activation_name(cast(Any, tower.last.layer))
    found = [
        Decision("architecture", architecture, "config.json"),
        Decision("weights", backbone.spec.partition(":")[2], "the spec"),
        Decision("activation", activation, "config.json"),
        *transform_decisions(backbone.transform, size=rest if processor else "config.json", rest=rest),
        Decision("prefix tokens", f"{tower.class_tokens} class, {tower.registers} register", "config.json"),
        Decision("pooling", pooling, "the architecture"),
    ]
    if "logits" in backbone.capabilities:
        found.append(Decision("label names", "yes" if backbone.label_names else "none", "config.json"))
    if "text" in backbone.capabilities:
        lower = ", texts in lower case" if tower.pools_by_attention else ""
        found += [
            Decision("tokenizer", type(backbone.tokenizer).__name__ + lower, "tokenizer_config.json"),
            Decision("context length", str(config.text_config.max_position_embeddings), "config.json"),
            Decision("logit scale", f"{backbone.logit_scale:.6g}", "the weights"),
            Decision("logit bias", f"{backbone.logit_bias:.6g}", "the weights"),
        ]
    return tuple(found)
