"""Image models of the timm library: vision transformers (plain, EVA, DINOv3), Swin, any other network as features."""

from __future__ import annotations

import difflib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import AttentionPoolLatent, AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from ood_core.backbones.base import Backbone, BlockParts, Decision, Layer, identity
from ood_core.backbones.checkpoint import load_strictly, read_checkpoint, without_wrappers
from ood_core.backbones.linear import NamedLinear, fused_qkv
from ood_core.backbones.loading import activation_name, as_channels, file_named, transform_decisions, unwrapped
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import DataError, MissingDataError, UsageError, unknown_name

__all__ = ["TimmBackbone", "image_transform", "load_timm"]

log = logging.getLogger(__name__)

# Pooling that keeps the width of a token, so that a patch lives in the space of the image embedding.
_POOLS = ("token", "avg", "avgmax", "max")

_PLAIN = {
    VisionTransformer: ((Block,), (Attention,)),
    Eva: ((EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope)),
}


class TimmBackbone(Backbone):
    """Any timm model: vision transformers and Swin with everything, other networks with the image only.

    The image embedding is what the classifier reads (`forward_head(..., pre_logits=True)`); a local feature is the
    final norm of one patch token, never of a class or register token. Rotary positions (DINOv3, EVA-02) turn queries
    and keys alone, so the value path has none.

    Where the head pools with attention (SigLIP's), a patch token behind the final norm is not in the space of the
    image embedding: the pooled token is. It is a convex combination of the pool's values, one for every patch, so a
    local feature is that value with what follows for the pooled token: value and output projection, then the pool's
    residual MLP. `local="tokens"` is the same there, as nothing else leads from a patch to the embedding.

    Args:
        model: a module made by `timm.create_model`, also compiled or in `DataParallel`.
        transform: the model's image transform, see `image_transform`.
        spec: name for messages and results.

    Raises:
        UsageError: a model without an image embedding (no pooling), or for neither colour nor grey images.
    """

    def __init__(self, model: nn.Module, transform: ImageTransform, *, spec: str = "timm") -> None:
        model = unwrapped(model)
        super().__init__(model, transform, spec=spec)
        self.network = cast(Any, model)
        self.channels = _channels(model)
        if self.channels not in (1, 3):
            raise UsageError(f"{spec!r} reads {self.channels} channels; images have 3, or 1 for grey: '?in_chans=3'.")
        self._swin = isinstance(model, SwinTransformer | SwinTransformerV2)
        self._rotary: dict[Any, Any] = {}
        capabilities = {"image"}
        if self._reads_tokens():
            capabilities |= {"local", "blocks"}
            self.grid = self._grid()
            self.width = self.network.attn_pool.out_features if self.pools_by_attention else self.network.num_features
            has_head = self.network.num_classes > 0
        else:
            self.width, has_head = self._probe()
        if has_head:
            capabilities.add("logits")
            names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
            self.label_names = list(names) if names and len(names) == self.network.num_classes else None
        self.capabilities = frozenset(capabilities)

    def _reads_tokens(self) -> bool:
        """Whether the blocks are understood and the head reads tokens that stand alone, or pools values of them."""
        network = self.network
        if self._swin:
            return network.head.global_pool.pool_type == "avg"
        return _is_plain(network) and (self.pools_by_attention or _pools_tokens(network))

    @property
    def pools_by_attention(self) -> bool:
        """Whether the head is SigLIP's: one learned query attends to the patches behind the last block."""
        pool = getattr(self.network, "attn_pool", None)
        return isinstance(pool, AttentionPoolLatent) and pool.latent_len == 1 and _is_plain(self.network)

    def _grid(self) -> tuple[int, int]:
        if self._swin:
            rows, columns = self.network.layers[-1].output_resolution
        else:
            rows, columns = self.network.patch_embed.dynamic_feat_size(self.transform.crop)
        return int(rows), int(columns)

    @torch.no_grad()
    def _probe(self) -> tuple[int, bool]:
        """Width of the embedding, and whether the classifier applied to it gives the model's logits."""
        if not hasattr(self.network, "forward_features") or not hasattr(self.network, "forward_head"):
            raise UsageError(f"{self.spec!r} gives no image embedding: leave 'features_only' and the like away.")
        features = self.network.forward_features(as_channels(self._ramp(), self.channels))
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
        x = as_channels(x, self.channels)
        if "blocks" not in self.capabilities:
            return network.forward_head(network.forward_features(x), pre_logits=True)
        x = network.patch_embed(x)
        if self._swin:
            return x
        if isinstance(network, Eva):
            return network.norm_pre(network._pos_embed(x)[0])
        return network.norm_pre(network.patch_drop(network._pos_embed(x)))

    def layers(self, tower: str = "visual", length: int | None = None) -> list[Layer]:
        """Blocks of a plain, EVA or Swin transformer whose head reads tokens."""
        if tower != "visual" or "blocks" not in self.capabilities:
            return []
        post_norm = isinstance(self.network, SwinTransformerV2)
        return [
            self._layer(f"visual.{name}", index, block, enter, post_norm)
            for index, (name, block, enter) in enumerate(self._blocks())
        ]

    def _layer(self, name: str, index: int, block: Any, enter: Any, post_norm: bool) -> Layer:
        if not isinstance(self.network, Eva):
            return Layer(name, block, _block_parts(block, post_norm), block, enter)
        rope = self._rope(index)
        return Layer(name, partial(block, rope=rope), _eva_parts(block, rope), block, enter)

    def _rope(self, index: int) -> Tensor | None:
        """Rotary positions of a block, as the network hands them to it."""
        rope = getattr(self.network, "rope", None)
        if rope is None:
            return None
        key = (self.device, self.dtype)
        if key not in self._rotary:
            fixed = not self.network.dynamic_img_size and hasattr(rope, "feat_shape")
            self._rotary = {key: rope.get_embed() if fixed else rope.get_embed(shape=list(self.grid or ()))}
        return self._rotary[key][index] if self.network.rope_mixed else self._rotary[key]

    @property
    def reads_class_token(self) -> bool:
        """Whether a plain transformer pools its class token."""
        return not self._swin and "blocks" in self.capabilities and self.network.global_pool == "token"

    @property
    def last_block(self) -> nn.Module:
        """The last transformer block; EVA's as a function of tokens, the library's own module in its `layer`."""
        self.require("blocks")
        if isinstance(self.network, Eva):
            return _RotaryBlock(self.network.blocks[-1], self._rope(len(self.network.blocks) - 1))
        return (self.network.layers[-1] if self._swin else self.network).blocks[-1]

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last block; some transformers have it behind the pooling."""
        self.require("blocks")
        behind_pooling = isinstance(self.network.norm, nn.Identity)
        return self.network.fc_norm if behind_pooling else self.network.norm

    def image_embedding(self, tokens: Tensor) -> Tensor:
        if "blocks" not in self.capabilities:
            return tokens
        return self.network.forward_head(self.network.norm(tokens), pre_logits=True)

    def local_embedding(self, tokens: Tensor) -> Tensor:
        if self._swin:
            return self.network.norm(tokens).flatten(1, 2)
        patches = self.network.norm(tokens[:, self.network.num_prefix_tokens :])
        if self.pools_by_attention:
            patches = _pool_value(self.network.attn_pool, patches)
        return self.network.fc_norm(patches)

    def pool_values(self, tokens: Tensor) -> Tensor:
        return self.local_embedding(tokens)

    def save(self, folder: str | Path) -> str:
        Path(folder).mkdir(parents=True, exist_ok=True)
        timm.models.save_for_hf(self.model, str(folder), safe_serialization=True)
        return f"Saved: load it as 'timm:local-dir:{folder}'."

    def logits(self, embedding: Tensor) -> Tensor:
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


class _RotaryBlock(nn.Module):
    """An EVA block called with tokens only."""

    def __init__(self, layer: nn.Module, rope: Tensor | None) -> None:
        super().__init__()
        self.layer, self.rope = layer, rope

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, rope=self.rope)


def _is_plain(network: nn.Module) -> bool:
    """A vision transformer of ordinary sequential blocks (no parallel or distilled variants)."""
    blocks, attentions = _PLAIN.get(type(network), ((), ()))  # type: ignore[call-overload]
    return bool(blocks) and all(
        type(block) in blocks and type(block.attn) in attentions for block in cast(Any, network).blocks
    )


def _pools_tokens(network: Any) -> bool:
    return network.attn_pool is None and network.global_pool in _POOLS


def _channels(model: Any) -> int:
    """Channels that a network reads; some families keep no record of it, their first convolution tells."""
    recorded = getattr(model, "in_chans", None)
    convolutions = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return int(recorded or next(convolutions, 3))


def _block_parts(block: Any, post_norm: bool) -> BlockParts:
    attention = block.attn

    return BlockParts(
        block.norm1,
        getattr(block, "_attn", attention),  # Swin's windows
        partial(_value, attention),
        attention.proj,
        block.norm2,
        block.mlp,
        _scale(block, 1, getattr(block, "ls1", identity)),
        _scale(block, 2, getattr(block, "ls2", identity)),
        post_norm=post_norm,
    )


def _eva_parts(block: Any, rope: Tensor | None) -> BlockParts:
    return BlockParts(
        block.norm1,
        partial(block.attn, rope=rope),
        partial(_value, block.attn),
        block.attn.proj,
        block.norm2,
        block.mlp,
        _scale(block, 1, _times(getattr(block, "gamma_1", None))),
        _scale(block, 2, _times(getattr(block, "gamma_2", None))),
        post_norm=isinstance(block, EvaBlockPostNorm),
    )


def _scale(block: Any, branch: int, layer_scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """LayerScale, and stochastic depth, which does nothing but in training."""
    drop = getattr(block, f"drop_path{branch}", identity)
    return lambda x: drop(layer_scale(x))


def _times(gamma: Tensor | None) -> Callable[[Tensor], Tensor]:
    return identity if gamma is None else lambda x: gamma * x


def _value(attention: Any, x: Tensor) -> Tensor:
    """Values of tokens [..., D] as the output projection receives them."""
    separate = attention.qkv is None  # some EVA models keep three projections
    value = attention.v_proj(x) if separate else F.linear(x, *_value_weights(attention))
    groups = getattr(attention, "num_kv_groups", 1)
    if groups > 1:  # several query heads share one value head
        value = value.unflatten(-1, (-1, attention.head_dim)).repeat_interleave(groups, -2).flatten(-2)
    return _gated(attention, x, value)


def _value_weights(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the value projection; Swin v2 and EVA keep its bias apart from the fused projection."""
    start = attention.qkv.weight.shape[0] // 3 * 2
    bias = attention.qkv.bias
    bias = getattr(attention, "v_bias", None) if bias is None else bias[start:]
    return attention.qkv.weight[start:], bias


def _gated(attention: Any, x: Tensor, value: Tensor) -> Tensor:
    """What a few models do to the attention's result before the output projection (norm, gate)."""
    value = getattr(attention, "norm", identity)(value)
    gate = getattr(attention, "gate", None)
    return value if gate is None else value * gate(x).sigmoid()


def _pool_value(pool: Any, x: Tensor) -> Tensor:
    """What an attention pool makes of patches [B, P, D] if it attends to one of them alone: [B, P, d]."""
    x = x if pool.pos_embed is None else x + pool.pos_embed.to(x.dtype)
    width = pool.kv.weight.shape[0] // 2
    x = pool.proj(F.linear(x, pool.kv.weight[width:], None if pool.kv.bias is None else pool.kv.bias[width:]))
    return x if pool.mlp is None else x + pool.mlp(pool.norm(x))


def _block_weights(block: Any) -> dict[str, Any]:
    attention, mlp = block.attn, block.mlp
    if attention.qkv is None:
        weights: dict[str, Any] = {
            "query": attention.q_proj.weight,
            "key": attention.k_proj.weight,
            "value": attention.v_proj.weight,
        }
    else:
        weights = fused_qkv(attention.qkv.weight)
    if hasattr(mlp, "fc1_x"):  # SwiGLU with separate gate
        up: Any = mlp.fc1_x.weight
    elif hasattr(mlp, "gate_last"):  # GluMlp packs gate and up-projection
        half = mlp.fc1.weight.shape[0] // 2
        up = (mlp.fc1.weight, slice(0, half) if mlp.gate_last else slice(half, 2 * half))
    else:
        up = mlp.fc1.weight
    return weights | {"out": attention.proj.weight, "up": up, "down": mlp.fc2.weight}


# ---- the image transform


def image_transform(model: nn.Module) -> ImageTransform:
    """The evaluation transform that a timm model asks for, at the size the model was built for."""
    config = resolve_model_data_config(unwrapped(model))
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built or config["input_size"][1:]
    crop = (int(height), int(width))
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if _channels(model) == 1:  # a grey image is one channel: the channels' values on the average
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    resize, fit = _resizing(crop, config["crop_pct"], config["crop_mode"])
    return ImageTransform(
        crop=crop,
        resize=resize,
        mean=mean,
        std=std,
        interpolation=config["interpolation"],
        fit=fit,
        fill=tuple(round(255 * (mean * 3)[i]) for i in range(3)) if fit == "contain" else (0, 0, 0),
    )


def _resizing(crop: tuple[int, int], share: float, mode: str) -> tuple[Any, str]:
    """What timm resizes an image to before the crop, and how the image meets it."""
    target = tuple(math.floor(side / share) for side in crop)
    if mode == "squash":
        return (None, "cover") if target == crop else (target, "squash")
    if mode == "border":
        return target, "contain"
    return (target[0] if target[0] == target[1] else target), "cover"


# ---- loading


def load_timm(name: str, *, spec: str) -> TimmBackbone:
    """Load "NAME.TAG", "NAME" (random weights), "NAME/FILE" (weights from a file) or "local-dir:FOLDER".

    The configuration of the tag or folder decides about sizes, normalisation and classes. A file brings weights
    alone: the configuration is that of NAME ("NAME.TAG/FILE": of that tag), the number of classes the file's.
    Weights are read as tensors only.

    A query sets arguments of `timm.create_model`: "NAME.TAG?img_size=224&num_classes=0"; "img_size=224,448" is
    height and width. Values are numbers, true, false, null, JSON, or else text; "checkpoint_path=FILE" is "NAME/FILE".

    Raises:
        UsageError: an unknown model or tag with the nearest known ones, or arguments the model does not take.
        MissingDataError: weights that cannot be fetched or a file or folder that is not there.
        DataError: weights of another network; the message names what is missing, left over or of another shape.
    """
    name, _, query = name.partition("?")
    options = _options(query, spec)
    stored = name.startswith(("local-dir:", "hf-hub:"))
    name, _, file = (name, "", "") if stored else name.partition("/")
    file = str(options.pop("checkpoint_path", None) or file)
    architecture, _, tag = name.partition(".")
    if not stored:
        _check_names(architecture, tag)
    if file:
        model = _from_file(name, file_named(file, spec), options, spec)
    else:
        if not stored and not tag:
            log.warning("%s: no weights named, so they are random and scores mean nothing.", spec)
        model = _create(name, options, spec, pretrained=stored or bool(tag))
    backbone = TimmBackbone(model, image_transform(model), spec=spec)
    backbone.decisions = _decisions(backbone, tag, file, stored, options)
    return backbone


def _create(name: str, options: dict[str, Any], spec: str, *, pretrained: bool) -> nn.Module:
    try:
        with _no_weight_left_behind(spec):
            return timm.create_model(name, pretrained=pretrained, **options)
    except DataError:
        raise
    except Exception as error:
        raise _loading_error(error, spec, pretrained=pretrained) from error


def _loading_error(error: Exception, spec: str, *, pretrained: bool) -> Exception:
    said = " ".join(str(error).split())
    if pretrained and "Error(s) in loading state_dict" in said:
        found = said.partition("Error(s) in loading state_dict for ")[2]
        return DataError(
            f"The weights of {spec!r} do not belong to this network: {found[:400]}. Leave away options that change it "
            "(num_classes=0 drops the classifier), or name the architecture they were trained with."
        )
    if not pretrained or (
        isinstance(error, TypeError | AssertionError | ValueError) and not isinstance(error, OSError)
    ):
        return UsageError(f"timm cannot build {spec!r}: {said[:400]}")
    return MissingDataError(
        f"The weights of {spec!r} could not be loaded ({type(error).__name__}: {said[:200]}). Without a network use "
        "'tiny', or weights saved before: 'timm:NAME/FILE' or 'timm:local-dir:/path'."
    )


class _Heard(logging.Handler):
    """Keeps what timm's loader says."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _no_weight_left_behind(spec: str) -> Iterator[None]:
    """Turn into errors what timm only logs while loading: weights that stay random, and weights not used."""
    logger, heard = logging.getLogger("timm.models._builder"), _Heard()
    level, logger.propagate, propagated = logger.level, False, logger.propagate
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)
        logger.propagate = propagated
    for said in heard.said:
        if said.startswith(("Missing keys (", "Unexpected keys (", "Unable to convert pretrained")):
            names = said.partition(" discovered while")[0].partition(" found while")[0]
            raise DataError(
                f"The weights of {spec!r} do not fit the network that its options ask for: {names[:400]}. They would "
                "stay random or unused: leave such options away (num_classes=0 gives features without a classifier)."
            )


def _from_file(name: str, path: Path, options: dict[str, Any], spec: str) -> nn.Module:
    """A model with the weights of a file, with as many classes as the file has."""
    state = read_checkpoint(path).state
    model = _create(name, options, spec, pretrained=False)
    state = without_wrappers(state, model.state_dict())
    classes = _classes_in(state, model)
    if "num_classes" not in options and classes != getattr(model, "num_classes", classes):
        model = _create(name, options | {"num_classes": classes}, spec, pretrained=False)
    load_strictly(model, _converted(state, model), source=f"The checkpoint {path}")
    return model


def _classes_in(state: dict[str, Tensor], model: Any) -> int:
    """Rows of the classifier's weight in a file, 0 if it has none."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        if f"{name}.weight" in state:
            return len(state[f"{name}.weight"])
    return 0 if names else int(getattr(model, "num_classes", 0))


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights as they are if they fit, else as timm converts those of the original code, or of another image size."""
    own = model.state_dict()
    if own.keys() == state.keys() and all(own[name].shape == state[name].shape for name in own):
        return state
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return state if convert is None else dict(convert(dict(state), model))
    except Exception:  # weights that the converter does not know: what does not fit is named by name
        return state


def _options(query: str, spec: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise UsageError(f"{spec!r}: options are written '?img_size=224&num_classes=0', got {query!r}.") from error
    return {key: text if key == "checkpoint_path" else _option(text) for key, text in pairs}


def _option(text: str) -> Any:
    """A value by what it looks like: 224, 0.5, 1e-3, true, null, JSON, "224,448"; anything else is text."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for written in (text, f"[{text}]" if "," in text else "null"):
        try:
            value = json.loads(written, parse_constant=lambda word: word)
        except ValueError:
            continue
        if value is not None:
            return tuple(value) if isinstance(value, list) else value
    return text


def _check_names(architecture: str, tag: str) -> None:
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UsageError(f"Unknown timm model {architecture!r}.{hint} timm.list_models() gives all names.")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise unknown_name(f"weights for timm {architecture}", tag, tags or ["none"])


# ---- what was decided


def _decisions(
    backbone: TimmBackbone, tag: str, file: str, stored: bool, options: dict[str, Any]
) -> tuple[Decision, ...]:
    network = backbone.network
    config = getattr(network, "pretrained_cfg", None) or {}
    origin = (
        "config.json of the folder or repository"
        if stored
        else f"the configuration of the tag {tag!r}"
        if tag
        else f"timm's configuration of {config.get('architecture')}"
    )
    size = "the option img_size" if "img_size" in options else origin
    weights = f"the file {file}" if file else "random" if not (tag or stored) else tag or "the folder or repository"
    prefix = getattr(network, "num_prefix_tokens", 0)
    registers = getattr(network, "num_reg_tokens", None)
    token = getattr(network, "cls_token", None) is not None
    registers = prefix - token if registers is None else registers
    block = next((one for _, one, _ in backbone._blocks()), None)
    pooling = (
        "attention" if backbone.pools_by_attention else str(getattr(network, "global_pool", "of the architecture"))
    )
    found = [
        Decision("architecture", str(config.get("architecture") or type(network).__name__), "the spec"),
        Decision("weights", weights, "the spec"),
        Decision("activation", activation_name(network if block is None else block.mlp), "timm's model"),
        *transform_decisions(backbone.transform, size=size, rest=origin),
        Decision("prefix tokens", f"{int(token)} class, {registers} register", "timm's model"),
        Decision("pooling", pooling, "the option global_pool" if "global_pool" in options else origin),
        Decision("classes", str(getattr(network, "num_classes", 0)), "the file" if file else origin),
        Decision("label names", "yes" if backbone.label_names else "none", origin),
    ]
    return tuple(found)
