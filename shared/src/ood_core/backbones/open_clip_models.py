"""open_clip's models, built as their weights ask: what a tag, a folder or a file says wins over the architecture.

Every choice is recorded as a `Decision`; where architecture and weights contradict each other, that is said once.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import get_pretrained_cfg
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from ood_core.backbones.base import Decision
from ood_core.backbones.checkpoint import Checkpoint, load_strictly, read_checkpoint, without_wrappers
from ood_core.backbones.loading import activation_name, transform_decisions
from ood_core.backbones.specs import names_file
from ood_core.backbones.transform import CLIP_MEAN, CLIP_STD, ImageTransform
from ood_core.errors import DataError, MissingDataError, OODError, UsageError, unknown_name

__all__ = ["Built", "build", "image_transform"]

log = logging.getLogger(__name__)

_CONFIG = "open_clip_config.json"
_OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode", "fill_color")
# What open_clip's own programs call the weights of a saved model, best first.
_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)


class Built(NamedTuple):
    """A model and what belongs to it."""

    model: nn.Module
    tokenizer: Any
    transform: ImageTransform
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class _Source:
    """Where a model comes from.

    Attributes:
        name: as open_clip is asked for it: an architecture, "local-dir:FOLDER" or "hf-hub:REPOSITORY".
        config: of the model.
        asked: what the weights ask for (preprocessing, "quick_gelu"); only what they say themselves.
        origin: says in messages where `asked` was found.
        tag: of published weights.
        file: of weights.
        random: whether there are none.
    """

    name: str
    config: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    origin: str = "the architecture"
    tag: str = ""
    file: Path | None = None
    random: bool = False


def build(name: str, *, spec: str) -> Built:
    """Build the model of "ARCHITECTURE/TAG", "ARCHITECTURE/FILE", "ARCHITECTURE", "local-dir:FOLDER", "hf-hub:NAME".

    "?quick_gelu=true" (or false) behind it decides the activation, for weights that cannot say it themselves.

    Raises:
        UsageError: an unknown architecture, tag or option, or a missing package.
        MissingDataError: weights, a folder or a tokenizer that cannot be had.
        DataError: weights that do not belong to the model, or a damaged file.
    """
    name, _, query = name.partition("?")
    forced = _options(query, spec).get("quick_gelu")
    with _failures(spec):
        source = _find(name, spec)
    if source.random:
        log.warning("%s: no weights named, so they are random and scores mean nothing.", spec)
    with _failures(spec), _warnings_said(spec):
        checkpoint = None if source.file is None else read_checkpoint(source.file)
        quick_gelu, why = _activation(source, checkpoint, forced, spec)
        model = _create(source, quick_gelu)
        if checkpoint is not None:
            _load(model, checkpoint)
        tokenizer = open_clip.get_tokenizer(source.name)
    transform = image_transform(model)
    return Built(model, tokenizer, transform, _decisions(model, tokenizer, transform, source, why))


def image_transform(model: Any) -> ImageTransform:
    """The evaluation transform that an open_clip model asks for, at the size that its tower was built for."""
    config = open_clip.get_model_preprocess_cfg(model)
    crop = _built_size(model.visual) or _pair(config["size"])
    mode = config.get("resize_mode", "shortest")
    # "longest": the whole image inside the square, the rest filled.
    ways = {"shortest": (max(crop), "cover"), "squash": (None, "cover"), "longest": (crop, "contain")}
    if mode not in ways:
        raise UsageError(f"resize_mode={mode!r} of an open_clip model is not supported: use one of {', '.join(ways)}.")
    resize, fit = ways[mode]
    return ImageTransform(
        crop=crop,
        resize=resize,
        mean=tuple(config.get("mean", CLIP_MEAN)),
        std=tuple(config.get("std", CLIP_STD)),
        interpolation=config.get("interpolation", "bicubic"),
        fit=fit,
        fill=tuple(np.broadcast_to(config.get("fill_color", 0), 3).tolist()),
    )


# ---- where the model comes from


def _find(name: str, spec: str) -> _Source:
    if name.startswith("local-dir:"):
        return _folder(Path(name.removeprefix("local-dir:")).expanduser())
    if name.startswith("hf-hub:"):
        return _Source(name, open_clip.get_model_config(name), {}, f"{_CONFIG} of {name!r}")
    architecture, _, weights = name.partition("/")
    if architecture not in open_clip.list_models():
        raise unknown_name("open_clip architecture", architecture, open_clip.list_models())
    config = open_clip.get_model_config(architecture)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if asked := get_pretrained_cfg(architecture, weights):
        return _Source(architecture, config, dict(asked), f"the configuration of the tag {weights!r}", weights)
    if weights and not names_file(weights):
        raise unknown_name(f"weights for open_clip {architecture}", weights, tags or ["none"])
    common, origin = _common(architecture, tags, spec)
    return _Source(architecture, config, common, origin, "", Path(weights) if weights else None, not weights)


def _folder(folder: Path) -> _Source:
    if not folder.is_dir():
        raise MissingDataError(
            f"The model in {folder} could not be loaded: there is no such folder. Give one with {_CONFIG} and the "
            "weights, or use 'tiny'."
        )
    file = folder / _CONFIG
    if not file.is_file():
        raise MissingDataError(f"{folder} holds no {_CONFIG}, which names the architecture and the preprocessing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config, asked = content["model_cfg"], content.get("preprocess_cfg") or {}
        config["vision_cfg"], config["text_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no configuration of open_clip ({type(error).__name__}: {error}).") from error
    return _Source(f"local-dir:{folder}", config, asked, str(file), file=_weights_in(folder))


def _weights_in(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    named = sorted((path for path in found if path.name in _WEIGHTS), key=lambda path: _WEIGHTS.index(path.name))
    if not found:
        raise MissingDataError(f"{folder} holds no weights: put {_WEIGHTS[0]} or {_WEIGHTS[2]} beside {_CONFIG}.")
    if not named and len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise DataError(f"{folder} holds several weights ({names}): call the ones to use {_WEIGHTS[0]}.")
    return (named or found)[0]


def _common(architecture: str, tags: list[str], spec: str) -> tuple[dict[str, Any], str]:
    """What all published weights of an architecture agree on: the best that is known of a file of the same kind."""
    published = [get_pretrained_cfg(architecture, tag) for tag in tags]
    if not published:
        return {}, "open_clip's defaults"
    unlike = [key for key in _PREPROCESSING if len({str(one.get(key)) for one in published}) > 1]
    if unlike:
        log.warning(
            "%s: the published weights of %s differ in %s, and these say nothing of it: CLIP's are used. A folder "
            "with %s ('open_clip:local-dir:FOLDER') can say it.",
            *(spec, architecture, " and ".join(unlike), _CONFIG),
        )
    keys = [key for key in _PREPROCESSING if key in published[0] and key not in unlike]
    common = {key: published[0][key] for key in keys}
    if len(quick := {one.get("quick_gelu", False) for one in published}) == 1:
        common["quick_gelu"] = quick.pop()
    return common, f"what all published weights of {architecture} ask for"


def _options(query: str, spec: str) -> dict[str, bool]:
    known = {"true": True, "1": True, "false": False, "0": False}
    try:
        pairs = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise UsageError(f"{spec!r}: an option is written '?quick_gelu=true', got {query!r}.") from error
    for key, value in pairs.items():
        if key != "quick_gelu":
            raise unknown_name(f"option of {spec!r}", key, ["quick_gelu"])
        if value.lower() not in known:
            raise UsageError(f"{spec!r}: quick_gelu={value!r} must be true or false.")
    return {key: known[value.lower()] for key, value in pairs.items()}


# ---- activation


def _activation(source: _Source, checkpoint: Checkpoint | None, forced: bool | None, spec: str) -> tuple[bool, str]:
    """Whether the blocks have QuickGELU, and what says so; a contradiction is said."""
    built = bool(source.config.get("quick_gelu", False))
    openai = _openai_format(checkpoint)
    if forced is not None:
        wanted, why = forced, "the option quick_gelu"
    elif openai:
        wanted, why = True, f"the file's format, which is OpenAI's ({openai})"
    elif "quick_gelu" in source.asked and not source.random:
        wanted, why = bool(source.asked["quick_gelu"]), source.origin
    else:
        wanted, why = built, f"the architecture {source.name}"
        if source.file is not None and "quick_gelu" not in source.config and not source.name.startswith("local-dir:"):
            _warn_of_unknown_activation(source, spec)
    if wanted != built and not source.random:
        names = {True: "QuickGELU", False: "GELU"}
        log.warning("%s: %s has %s; %s is built, as %s says.", spec, source.name, names[built], names[wanted], why)
    return wanted, why


def _warn_of_unknown_activation(source: _Source, spec: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(source.name)
    quick = [tag for tag in tags if get_pretrained_cfg(source.name, tag).get("quick_gelu")]
    if quick:
        log.warning(
            "%s: the file does not say its activation, and published weights differ: GELU is built. Weights that come "
            "from %s need '?quick_gelu=true'.",
            *(spec, " or ".join(map(repr, quick))),
        )


def _openai_format(checkpoint: Checkpoint | None) -> str:
    """By what a file is known as one of OpenAI's or a training that went on from it; "" if it is none."""
    if checkpoint is None:
        return ""
    state = {name.rpartition("visual.")[1] + name.rpartition("visual.")[2]: v for name, v in checkpoint.state.items()}
    if set(_OPENAI_KEYS) <= {name.rpartition(".")[2] for name in checkpoint.state}:
        return f"it holds {', '.join(_OPENAI_KEYS)}"
    conv, norm = state.get("visual.conv1.weight"), state.get("visual.ln_post.weight", state.get("visual.bn1.weight"))
    if conv is not None and norm is not None and (conv.dtype, norm.dtype) == (torch.float16, torch.float32):
        return "its layers are in half precision and its norms are not"
    return ""


# ---- building and loading


def _create(source: _Source, quick_gelu: bool) -> nn.Module:
    if source.tag:
        return open_clip.create_model(
            source.name, pretrained=source.tag, quick_gelu=quick_gelu, require_pretrained=True
        )
    if source.name.startswith("hf-hub:"):
        return open_clip.create_model(source.name, quick_gelu=quick_gelu, require_pretrained=True)
    return open_clip.create_model(
        source.name,
        load_weights=False,
        pretrained_text=False,
        quick_gelu=quick_gelu,
        force_preprocess_cfg={key: source.asked[key] for key in _PREPROCESSING if key in source.asked},
    )


def _load(model: Any, checkpoint: Checkpoint) -> None:
    own = model.state_dict()
    custom = not hasattr(model, "positional_embedding")
    plain = [name.removeprefix("text.") for name in own]
    state = without_wrappers(checkpoint.state, [*own, *plain, *(f"text.{name}" for name in own), *_OPENAI_KEYS])
    if any(name.startswith("text_model.") for name in state):
        raise DataError(
            f"The checkpoint {checkpoint.path} is one of transformers: use 'hf:FOLDER' with its folder, in which "
            "config.json lies."
        )
    state = convert_state_dict(model, state)
    if custom and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
    if not custom:
        state = {name.removeprefix("text."): value for name, value in state.items()}
    load_strictly(model, _without_bookkeeping(state, own), source=f"The checkpoint {checkpoint.path}")


def _without_bookkeeping(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what old versions stored beside the weights; numbers are brought into the shape they have here."""
    kept = {
        name: value
        for name, value in state.items()
        if name in own or name.rpartition(".")[2] not in (*_OPENAI_KEYS, "attn_mask", "position_ids")
    }
    for name in ("logit_scale", "logit_bias"):
        if name in kept and name in own and kept[name].numel() == own[name].numel():
            kept[name] = kept[name].reshape(own[name].shape)
    # How many batches a norm has seen is told in some files only and changes nothing.
    return {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | kept


@contextmanager
def _warnings_said(spec: str) -> Iterator[None]:
    """Warnings of open_clip reach the user as ours do, but for two that are settled here."""
    root = logging.getLogger()
    root.addFilter(_not_about_randomness)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        root.removeFilter(_not_about_randomness)
    quiet = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
    said = [str(one.message) for one in caught if not issubclass(one.category, quiet)]
    for message in dict.fromkeys(said):
        if not message.startswith("QuickGELU mismatch"):  # decided by `_activation`
            log.warning("%s: %s", spec, message)


def _not_about_randomness(record: logging.LogRecord) -> bool:
    """Weights of files and folders are loaded behind open_clip's back, and random ones have been named."""
    return not str(record.msg).startswith("No pretrained weights loaded for model")


@contextmanager
def _failures(spec: str) -> Iterator[None]:
    """Every failure as a sentence with the remedy that fits."""
    try:
        yield
    except OODError:
        raise
    except ImportError as error:
        raise UsageError(f"{spec!r} needs transformers: pip install 'ood-core[transformers]' ({error}).") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if "loading state_dict" in str(error) or "size mismatch" in str(error):
            raise DataError(
                f"The weights of {spec!r} do not belong to this architecture ({reason}): name the architecture that "
                "they were trained with."
            ) from error
        if isinstance(error, TypeError | AssertionError | KeyError):
            raise DataError(f"open_clip {open_clip.__version__} cannot build {spec!r} ({reason}).") from error
        raise MissingDataError(
            f"The files of {spec!r} could not be loaded ({reason}). Without a network use 'tiny', a file of the "
            "weights: 'open_clip:ARCHITECTURE//path/to/file', or a folder saved before: 'open_clip:local-dir:/path'."
        ) from error


# ---- what was decided


def _decisions(
    model: Any, tokenizer: Any, transform: ImageTransform, source: _Source, why: str
) -> tuple[Decision, ...]:
    architecture = source.origin if ":" in source.name else f"the architecture {source.name}"
    config, weights = open_clip.get_model_preprocess_cfg(model), "random" if source.random else "the weights"
    told = _built_size(model.visual) not in (None, _pair(config["size"]))
    size = "the position table of the tower" if told else architecture
    sources = {key: _said_by(source, key) for key in ("mean", "std", "interpolation")}
    sources["resize"] = _said_by(source, "resize_mode")
    bias = (
        [] if model.logit_bias is None else [Decision("logit bias", f"{float(model.logit_bias.detach()):.4g}", weights)]
    )
    return (
        Decision("activation", _activations(model), why),
        *transform_decisions(transform, size=size, rest=architecture, sources=sources),
        Decision("prefix tokens", _prefix_tokens(model.visual), architecture),
        Decision("tokenizer", _tokenizer_name(tokenizer, source), architecture),
        Decision("context length", str(tokenizer.context_length), architecture),
        Decision("logit scale", f"{float(model.logit_scale.detach().exp()):.4g}", weights),
        *bias,
    )


def _said_by(source: _Source, key: str) -> str:
    return source.origin if key in source.asked or source.name.startswith("hf-hub:") else "open_clip's default"


def _activations(model: Any) -> str:
    text = model.text if hasattr(model, "text") else model.transformer
    towers = {"image": activation_name(model.visual), "text": activation_name(text)}
    if len(set(towers.values())) == 1:
        return towers["image"]
    return ", ".join(f"{tower} {name}" for tower, name in towers.items())


def _prefix_tokens(visual: Any) -> str:
    if isinstance(visual, TimmModel):
        count = int(getattr(visual.trunk, "num_prefix_tokens", 0))
    else:
        count = int(hasattr(visual, "class_embedding"))
    return {0: "none", 1: "1 (class token)"}.get(count, f"{count} (class token and registers)")


def _tokenizer_name(tokenizer: Any, source: _Source) -> str:
    text = source.config.get("text_cfg", {})
    if name := text.get("hf_tokenizer_name"):
        clean = (text.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
        lower = ", lower-cased without punctuation" if clean == "canonicalize" else ""
        return f"{type(tokenizer).__name__} {name}{lower}"
    return f"{type(tokenizer).__name__} (CLIP's byte pairs, lower-cased)"


def _built_size(visual: Any) -> tuple[int, int] | None:
    """The only size that a tower of timm takes, if there is one: its position table is made for it."""
    embed = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return _pair(size) if size is not None and getattr(embed, "strict_img_size", True) else None


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
