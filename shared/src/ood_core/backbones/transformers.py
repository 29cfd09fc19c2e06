"""Models of the transformers library: CLIP, ViT, DINOv2 (with and without registers), Swin v2."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ood_core.backbones.base import Backbone, BlockParts, Layer, identity
from ood_core.backbones.linear import KINDS, NamedLinear
from ood_core.backbones.transform import CLIP_MEAN, CLIP_STD, ImageTransform
from ood_core.errors import MissingDataError, UsageError

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


class TransformersBackbone(Backbone):
    """A transformers model of a supported architecture (`SUPPORTED`).

    The image embedding is CLIP's projected class token, the class token behind the final norm (ViT, DINOv2),
    the mean of all cells behind it (Swin v2), or what a DINOv2 classifier reads: class token and mean patch,
    side by side. That head cannot read a single patch, so DINOv2 classifiers have no local features.

    Args:
        model: a module of one of the supported classes.
        transform: the model's image transform, see `image_transform`.
        tokenizer: a transformers tokenizer, for CLIP; without it the backbone has no text.
        spec: name for messages and results.

    Raises:
        UsageError: a model of another class.
    """

    def __init__(self, model: nn.Module, transform: ImageTransform, *, tokenizer: Any = None, spec: str = "hf") -> None:
        super().__init__(model, transform, spec=spec)
        name = type(model).__name__
        if name not in SUPPORTED:
            raise _unsupported(spec, name)
        self.network = cast(Any, model)
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
        if name == "CLIPModel":
            self.width = self.network.config.projection_dim
            self.logit_scale = float(self.network.logit_scale.exp())
            if tokenizer is not None:
                capabilities |= {"text", "prompts"}
                self.context_length = self.network.config.text_config.max_position_embeddings
        self.capabilities = frozenset(capabilities)

    def _twin(self, model: nn.Module) -> Self:
        return type(self)(model, self.transform, tokenizer=self.tokenizer, spec=self.spec)

    # ---- images

    def embed(self, x: Tensor) -> Tensor:
        """Input tokens of the first block, [B, T, D] or for Swin [B, h, w, D]."""
        return self.tower.embed(x)

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
        return [_plain_layer(f"text.{index}", block, _CLIP, mask[None, None]) for index, block in blocks]

    @property
    def reads_class_token(self) -> bool:
        """Whether the image embedding is of the class token."""
        return self.tower.reads_class_token

    @property
    def last_block(self) -> nn.Module:
        """The last transformer block as a function of tokens; its `layer` is the library's own module."""
        return self.tower.last

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last block."""
        return self.tower.norm

    def _image_embedding(self, tokens: Tensor) -> Tensor:
        return self._project(self.tower.image(tokens))

    def _local_embedding(self, tokens: Tensor) -> Tensor:
        return self._project(self.tower.local(tokens))

    def _project(self, x: Tensor) -> Tensor:
        return getattr(self.network, "visual_projection", identity)(x)

    def _logits(self, embedding: Tensor) -> Tensor:
        return self.classifier(embedding)

    # ---- texts

    def _tokenize(self, texts: list[str]) -> Tensor:
        return self.tokenizer(
            texts, padding="max_length", max_length=self.context_length, truncation=True, return_tensors="pt"
        )["input_ids"]

    def _end_positions(self, ids: Tensor) -> Tensor:
        end = self.network.text_model.config.eos_token_id
        # Configurations older than the vocabulary's own end mark say 2; the mark is then the largest id.
        return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)

    def _embed_tokens(self, ids: Tensor) -> Tensor:
        return self.network.text_model.embeddings.token_embedding(ids)

    def _add_positions(self, embeddings: Tensor) -> Tensor:
        positions = self.network.text_model.embeddings.position_embedding.weight
        return embeddings + positions[: embeddings.shape[1]]

    def _text_norm(self, hidden: Tensor) -> Tensor:
        return self.network.text_model.final_layer_norm(hidden)

    def _project_text(self, hidden: Tensor) -> Tensor:
        return self.network.text_projection(hidden)

    @property
    def text_projection(self) -> Tensor:
        """The last linear map of the text tower, [D, d]."""
        return self.network.text_projection.weight.T

    # ---- weights

    def _linears(self) -> Iterator[NamedLinear]:
        for layer, weights in self.tower.weights():
            yield from self._named("visual", layer, weights)
        if type(self.network).__name__ != "CLIPModel":
            return
        for index, block in enumerate(self.network.text_model.encoder.layers):
            yield from self._named("text", str(index), _plain_weights(block, _CLIP))
        for tower in ("visual", "text"):
            weight = self.network.get_submodule(f"{tower}_projection").weight
            yield NamedLinear(f"{tower}.projection", weight, on_change=self._record_edit)


# ---- image towers


class _Tower(ABC):
    """How one family of image towers is laid out."""

    grid: tuple[int, int]
    width: int
    last: _TokenBlock
    norm: nn.Module
    reads_class_token = True
    reads_mean_patch = False

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
    """A library's block called with tokens only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, None)


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


class _PlainTower(_Tower):
    """Class token, perhaps registers, patches; pre-norm blocks."""

    names: _Names

    def __init__(self, model: Any, crop: tuple[int, int]) -> None:
        base = model.base_model if self.names is not _CLIP else model
        self._embed = self._embedding(base, crop)
        self.layers = base.get_submodule(self.names.layers)
        self.norm = base.get_submodule(self.names.final)
        self.last = _TokenBlock(self.layers[-1])
        config = getattr(model.config, "vision_config", model.config)
        self.skip = 1 + getattr(config, "num_register_tokens", 0)
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

    def blocks(self) -> Iterator[Layer]:
        for index, block in enumerate(self.layers):
            yield _plain_layer(f"visual.{index}", block, self.names, None)

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

    def _embedding(self, base: Any, crop: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        vision = base.vision_model
        embed = super()._embedding(vision, crop)
        return lambda x: vision.pre_layrnorm(embed(x))


class _ViTTower(_PlainTower):
    names = _VIT


class _DinoTower(_PlainTower):
    names = _DINO


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
    "Swinv2Model": _SwinTower,
    "Swinv2ForImageClassification": _SwinTower,
}


def _plain_layer(name: str, block: Any, names: _Names, mask: Tensor | None) -> Layer:
    attention = getattr(block, names.attention)
    drop = getattr(block, "drop_path", identity)  # stochastic depth, which does nothing but in training
    scale1, scale2 = (_then(getattr(block, scale), drop) for scale in names.scales) if names.scales else (drop, drop)
    parts = BlockParts(
        getattr(block, names.norm1),
        lambda x: attention(x, attention_mask=mask)[0],
        attention.v_proj,
        getattr(attention, names.out),
        getattr(block, names.norm2),
        block.mlp,
        scale1,
        scale2,
    )
    return Layer(name, lambda x: block(x, mask), parts, block)


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
    gated = hasattr(block.mlp, "up_proj")  # SwiGLU of the giant DINOv2
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


def _label_names(config: Any) -> list[str] | None:
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    return None if all(name.startswith("LABEL_") for name in names) else names


# ---- loading


def image_transform(config: dict[str, Any], model_config: Any) -> ImageTransform:
    """The transform that an image processor's configuration describes.

    Args:
        config: contents of `preprocessor_config.json`; empty: the model's image size, usual normalisation.
        model_config: the model's configuration.
    """
    clip = hasattr(model_config, "vision_config")
    size = _pair(getattr(model_config, "vision_config", model_config).image_size)
    crop, resize = _sizes(config, size)
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = config.get("image_mean") or mean, config.get("image_std") or std
    if not config.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return ImageTransform(
        crop=crop,
        resize=resize,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)).name.lower(),
    )


def _sizes(config: dict[str, Any], default: tuple[int, int]) -> tuple[tuple[int, int], int | None]:
    """Crop and short side before it (None: both sides are resized, nothing is cropped)."""
    size = config.get("size") or {"shortest_edge": max(default)}
    cropped = config.get("do_center_crop", "crop_size" in config or "size" not in config)
    if isinstance(size, int):
        size = {"shortest_edge": size} if cropped else {"height": size, "width": size}
    crop = config.get("crop_size", default)
    crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else _pair(crop)
    if "shortest_edge" in size:
        return (crop if cropped else default), size["shortest_edge"]
    squashed = (size["height"], size["width"])
    return (crop, min(squashed)) if cropped and crop != squashed else (squashed, None)


def load_transformers(name: str, *, spec: str) -> TransformersBackbone:
    """Load a model by its name on the Hugging Face hub or from a folder, with its transform and tokenizer.

    Weights are read from safetensors, or from a checkpoint restricted to tensors; no remote code is run.

    Raises:
        UsageError: an architecture that is not supported; the message names those that are.
        MissingDataError: files that cannot be fetched or a folder that is not there.
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
    if missing := sorted(report["missing_keys"]):
        raise MissingDataError(f"The weights of {spec!r} are incomplete: {', '.join(missing[:3])} and others missing.")
    tokenizer = _fetch(spec, transformers.AutoTokenizer.from_pretrained, name) if "CLIP" in architecture else None
    transform = image_transform(_processor_config(name, spec), config)
    return TransformersBackbone(model, transform, tokenizer=tokenizer, spec=spec)


_DEFAULTS = {
    "clip": "CLIPModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "swinv2": "Swinv2Model",
}


def _processor_config(name: str, spec: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        log.warning("%s has no preprocessor_config.json: its image size and the usual mean and std are used.", spec)
        return {}


def _fetch(spec: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    try:
        return load(name, trust_remote_code=False, **options)
    except ValueError as error:  # an architecture this version does not know, or one that wants its own code run
        raise UsageError(f"{spec!r} cannot be used: {str(error)[:200]} {_supported()}") from error
    except Exception as error:
        raise MissingDataError(
            f"The files of {spec!r} could not be loaded ({type(error).__name__}: {str(error)[:200]}). "
            "Without a network use 'tiny', or a folder saved before: 'hf:/path'."
        ) from error


def _unsupported(spec: str, architecture: str) -> UsageError:
    return UsageError(f"{spec!r} is a {architecture or 'model without architecture'}. {_supported()}")


def _supported() -> str:
    return f"Supported: {', '.join(SUPPORTED)}; other libraries: 'open_clip:NAME/TAG', 'timm:NAME'."
