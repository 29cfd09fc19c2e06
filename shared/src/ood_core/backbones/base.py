"""The interface of every backbone, and the one place where images and texts are encoded.

An adapter says how its library runs a network up to the last block and what that block is made of; encoding, the
value path, text truncation and prompt learning are here, once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ood_core.backbones.linear import NamedLinear
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import UsageError, unknown_name
from ood_core.files import write_atomically

__all__ = ["FEATURES", "Backbone", "BlockParts", "Decision", "Layer", "hash_tensors", "identity"]

log = logging.getLogger(__name__)

FEATURES = ("image", "local", "logits", "local_logits")

# What a feature is made of, where it is no capability of its own.
_MADE_OF = {"local_logits": ("local", "logits")}

# Backbones to name when one lacks a capability.
_EXAMPLES = {
    "local": "'tiny', 'open_clip:ViT-B-16/openai' or 'timm:vit_base_patch14_dinov2.lvd142m'",
    "text": "'tiny', 'open_clip:ViT-B-16/openai' or 'hf:openai/clip-vit-base-patch16'",
    "logits": "'timm:swinv2_base_window16_256.ms_in1k' or another classifier",
    "blocks": "'tiny', 'open_clip:ViT-B-16/openai' or 'timm:vit_base_patch14_dinov2.lvd142m'",
    "prompts": "'tiny', 'open_clip:ViT-B-16/openai' or 'hf:openai/clip-vit-base-patch16'",
}


def identity(x: Tensor) -> Tensor:
    """The missing layer."""
    return x


class Decision(NamedTuple):
    """One thing that loading a backbone decided, for `ood doctor SPEC`.

    Attributes:
        what: e.g. "activation", "image size", "mean", "tokenizer".
        value: as it is used, e.g. "QuickGELU".
        source: where it comes from, e.g. "the configuration of the tag 'openai'".
    """

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class BlockParts:
    """A transformer block and what it is made of, as functions on tokens [..., D] (`post_norm`: Swin v2's order)."""

    norm1: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scale1: Callable[[Tensor], Tensor] = identity
    scale2: Callable[[Tensor], Tensor] = identity
    post_norm: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens behind the block."""
        return self.feed_forward(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """Tokens behind the attention and its residual."""
        return self._residual(x, self.norm1, self.attention, self.scale1)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Tokens behind the MLP and its residual."""
        return self._residual(x, self.norm2, self.mlp, self.scale2)

    def value_path(self, x: Tensor) -> Tensor:
        """The block with its attention weights replaced by the identity: every token sees only itself.

        Local features of GL-MCM, LoCoOp, IIM and SeTAR: value and output projection, both residuals, the MLP.

        Args:
            x: input tokens [..., D] of the block.

        Returns:
            Tokens of the same shape.
        """
        return self.feed_forward(self._residual(x, self.norm1, lambda y: self.out(self.value(y)), self.scale1))

    def _residual(
        self,
        x: Tensor,
        norm: Callable[[Tensor], Tensor],
        function: Callable[[Tensor], Tensor],
        scale: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return x + scale(norm(function(x)) if self.post_norm else function(norm(x)))


@dataclass(frozen=True)
class Layer:
    """One block of a tower, from the tokens that the block below gives to those it gives itself.

    Attributes:
        name: "TOWER.LAYER" as in the names of its weights, e.g. "visual.11".
        block: from tokens to tokens, as the library's own block.
        parts: what the block is made of.
        module: the library's own module, with the block's weights.
        enter: what lies between the block below and this one (Swin's patch merging), else nothing.
    """

    name: str
    block: Callable[[Tensor], Tensor]
    parts: BlockParts
    module: nn.Module
    enter: Callable[[Tensor], Tensor] = identity

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return self.block(self.enter(x))


_ExtraFeatures = Callable[[Tensor], Mapping[str, Tensor]]

# Prompts per text pass: enough to fill a processor, few enough to be of like length.
_PROMPTS = 64


class Backbone(ABC):
    """A frozen vision (and language) model behind one interface.

    Attributes:
        spec: the string that made it.
        model: the library's own module.
        capabilities: of "image", "local", "text", "prompts", "logits", "blocks".
        transform: PIL image of any size and mode to float32 [3, H, W].
        grid: patches (rows, columns) of the local features, or None.
        width: embedding width d.
        logit_scale: factor of cosines in the model's own logits (1.0 without a text tower).
        logit_bias: what the model adds to them (SigLIP; 0.0 else). The same for every class, so no softmax sees it.
        label_names: class names of a classifier head, if the library knows them.
        decisions: what loading decided and from what; empty for a backbone made in code.
        context_length: tokens of a text that the text tower reads, marks included; 0 without one.
        tokenizer: texts to token ids, with a text tower.

    Example:
        >>> from ood_core import create_backbone
        >>> backbone = create_backbone("tiny")
        >>> image, local = backbone.encode_dense(torch.zeros(2, 3, 64, 64))
        >>> image.shape, local.shape, backbone.grid
        (torch.Size([2, 192]), torch.Size([2, 64, 192]), (8, 8))
    """

    capabilities: frozenset[str]
    grid: tuple[int, int] | None = None
    width: int
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    label_names: list[str] | None = None
    decisions: tuple[Decision, ...] = ()
    context_length: int = 0
    tokenizer: Any = None

    def __init__(self, model: nn.Module, transform: ImageTransform, *, spec: str) -> None:
        self.spec = spec
        self.model: Any = model.eval().requires_grad_(False)
        self.transform = transform
        self._hash = hash_tensors(model.state_dict().items(), repr(model))
        self.edits: dict[str, tuple[str, str]] = {}  # name -> hashes of the original and the edited weight
        self.texts_seen: dict[str, Tensor] = {}
        self._words: dict[Any, tuple[Tensor, Tensor]] = {}
        self._prompt_chunk = 256
        self.added: dict[str, tuple[_ExtraFeatures, str]] = {}  # name -> (what computes it, what it depends on)

    # ---- what an adapter provides

    def embed(self, x: Tensor) -> Tensor:
        """Input tokens of the first block, [B, T, D] (class and register tokens first; [B, h, w, D] for Swin).

        A network without known blocks gives the image embedding, or what its attention pool reads. An adapter that
        overrides `prefix` needs no `embed`.
        """
        raise self._lacks("blocks")

    def layers(self, tower: str = "visual", length: int | None = None) -> list[Layer]:
        """The blocks of a tower, bottom first; none where they are not known.

        Args:
            tower: "visual" or "text".
            length: tokens per text, for the causal mask.
        """
        return []

    @property
    def reads_class_token(self) -> bool:
        """Whether the image embedding depends on the class token of the last block alone."""
        return False

    @property
    def pools_by_attention(self) -> bool:
        """Whether the image embedding is an attention pool over what comes out of the last block (SigLIP's head).

        A pool's result is a convex combination of its values, so the path from a patch into the space of the image
        embedding is the pool's value path: that, and not the last block's, is then `local="value"`.
        """
        return False

    @property
    def last_block(self) -> nn.Module:
        """The last transformer block, callable on the tokens of `prefix`; gradients flow."""
        raise self._lacks("blocks")

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last block, through which the class token is read."""
        raise self._lacks("blocks")

    @abstractmethod
    def image_embedding(self, tokens: Tensor) -> Tensor:
        """[B, d] from the tokens behind the last block, not normalised."""

    def local_embedding(self, tokens: Tensor) -> Tensor:
        """[B, P, d] from tokens behind the last block (or its value path), not normalised."""
        raise self._lacks("local")

    def pool_values(self, tokens: Tensor) -> Tensor:
        """[B, P, d] from the tokens behind the last block: the pool as if it attended to one patch alone."""
        raise self._lacks("local")

    def value_embedding(self, tokens: Tensor, behind: Tensor) -> Tensor:
        """[B, P, d] of the value path, not normalised.

        Args:
            tokens: input tokens of the last block.
            behind: its output tokens, which a pool's value path starts from.
        """
        if self.pools_by_attention:
            return self.pool_values(behind)
        return self.local_embedding(self.layers()[-1].parts.value_path(tokens))

    def logits(self, embedding: Tensor) -> Tensor:
        """Logits [..., C] of the classifier head from embeddings [..., d] that are not normalised."""
        raise self._lacks("logits")

    def _linears(self) -> Iterator[NamedLinear]:
        """Every named weight, top level names without a layer last."""
        return iter(())

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids int64 [N, L] of a causal tower, padded behind the end mark."""
        raise self._lacks("text")

    def end_positions(self, ids: Tensor) -> Tensor:
        """Index of the token that is read as the text's embedding, int64 [N]."""
        raise self._lacks("text")

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token embeddings [N, L, D] without positions."""
        raise self._lacks("text")

    def add_positions(self, embeddings: Tensor) -> Tensor:
        """Input tokens [N, L, D] of the first text block."""
        raise self._lacks("text")

    def text_norm(self, hidden: Tensor) -> Tensor:
        """The norm [N, D] behind the last text block."""
        raise self._lacks("text")

    def project_text(self, hidden: Tensor) -> Tensor:
        """[N, d] from [N, D], not normalised."""
        raise self._lacks("text")

    @property
    def text_projection(self) -> Tensor:
        """The last linear map of the text tower, [D, d]: embedding = hidden @ text_projection."""
        raise self._lacks("prompts")

    def copy(self) -> Self:
        """An independent backbone with the same weights."""
        twin = self._twin(copy.deepcopy(self.model))
        twin._hash, twin.edits, twin.decisions = self._hash, dict(self.edits), self.decisions
        # Read before the weights were rounded.
        twin.logit_scale, twin.logit_bias = self.logit_scale, self.logit_bias
        # Features that a method adds are computed from the original's weights: the copy goes without them.
        return twin

    def with_features(
        self,
        names: Collection[str],
        compute: Callable[[Tensor], Mapping[str, Tensor]],
        key: str,
        *,
        transform: ImageTransform | None = None,
    ) -> Self:
        """This backbone, weights shared, with features that a method adds to its own ("image", "local", ...).

        They are extracted, cached and handed to detectors as the others are: `extract(backbone, source, {"tiles"})`,
        `features.extra["tiles"]`.

        Args:
            names: of the features.
            compute: transformed images [B, 3, H, W] on the backbone's device, in the precision they were given in ->
                a tensor with B rows for every name.
            key: says all that the features depend on besides the backbone; part of the `fingerprint`.
            transform: in place of the backbone's own.

        Raises:
            ValueError: a name that is taken.

        Example:
            >>> from ood_core import create_backbone
            >>> bright = create_backbone("tiny").with_features(["mean"], lambda x: {"mean": x.mean((2, 3))}, "mean")
            >>> bright.encode(torch.zeros(2, 3, 64, 64), {"mean"})["mean"].shape
            torch.Size([2, 3])
        """
        if taken := set(names) & {*FEATURES, *self.added}:
            raise ValueError(f"This backbone has a feature {sorted(taken)[0]!r} already: give another name.")
        twin = copy.copy(self)
        twin.added = self.added | dict.fromkeys(names, (compute, key))
        twin.capabilities = self.capabilities | set(names)
        twin.transform = transform or self.transform
        return twin

    def _twin(self, model: nn.Module) -> Self:
        """This backbone around another model of the same kind."""
        return type(self)(model, self.transform, spec=self.spec)

    # ---- device and precision

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights; results are float32 whatever it is."""
        return next(self.model.parameters()).dtype

    @property
    def precision(self) -> str:
        """`dtype` by name, e.g. "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def record(self) -> dict[str, str]:
        """What results say of the backbone that they were made with: "spec", "fingerprint" and "dtype"."""
        return {"spec": self.spec, "fingerprint": self.fingerprint, "dtype": self.precision}

    # ---- images

    def prefix(self, x: Tensor, blocks: int = 1) -> Tensor:
        """Input tokens of the last blocks, [B, T, D] (class and register tokens first; [B, h, w, D] for Swin).

        A network without known blocks gives the image embedding, or what its attention pool reads.

        Args:
            x: transformed images [B, 3, H, W] on the backbone's device, in its precision.
            blocks: how many of the last blocks to leave out.

        Raises:
            ValueError: more blocks than there are, or none.
        """
        x = self.embed(x)
        layers = self.layers()
        if layers and not 1 <= blocks <= len(layers):
            raise ValueError(f"blocks={blocks} is outside [1, {len(layers)}], the blocks of {self.spec!r}.")
        for layer in layers[:-blocks]:
            x = layer(x)
        return layers[-blocks].enter(x) if layers else x

    def tail(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What comes of the input tokens of the last block; gradients flow.

        Where the image embedding reads the class token alone, the other tokens' MLP is left out.

        Args:
            tokens: as `prefix` gives them, [B, T, D].

        Returns:
            Image embedding [B, d] and local features [B, P, d] of the value path, not normalised.
        """
        last = self.layers()[-1]
        lone = self.reads_class_token
        behind = last.parts.feed_forward(last.parts.attend(tokens)[:, :1]) if lone else last.block(tokens)
        return self.image_embedding(behind), self.value_embedding(tokens, behind)

    @torch.no_grad()
    def encode(
        self, x: Tensor, needs: Collection[str] = ("image",), *, local: str = "value", normalize: bool = True
    ) -> dict[str, Tensor]:
        """Everything a detector may need, from one pass.

        Args:
            x: transformed images [B, 3, H, W] on any device.
            needs: of "image", "local", "logits", "local_logits" (the classifier head on every patch) and what
                `with_features` added.
            local: "value" (value path of the last block, or of the pool where one attends to the patches) or "tokens"
                (the last block's plain output tokens).
            normalize: unit-norm image and local features.

        Returns:
            float32 on the backbone's device: "image" [B, d], "local" [B, P, d], "logits" [B, C], "local_logits"
            [B, P, C]; added features as they are computed.

        Raises:
            UsageError: a need the backbone does not have; the message names backbones that do.
            ValueError: images of another shape than the transform gives, or NaN.
        """
        needs = self.check_needs(needs)
        if local not in ("value", "tokens"):
            raise ValueError(f"local={local!r} must be 'value' or 'tokens'.")
        pixels = self.prepare(x)
        out: dict[str, Tensor] = {}
        for compute, _ in {self.added[name] for name in needs & set(self.added)}:
            out |= {name: value for name, value in compute(x.to(self.device)).items() if name in needs}
        if not needs & set(FEATURES):
            return out
        tokens = self.prefix(pixels)
        whole = local == "tokens" or self.pools_by_attention or not needs.isdisjoint({"image", "logits"})
        full = self._run_last_block(tokens) if whole else tokens
        if "image" in needs or "logits" in needs:
            embedding = self.image_embedding(full)
            if "image" in needs:
                out["image"] = _finish(embedding, normalize)
            if "logits" in needs:
                out["logits"] = self.logits(embedding).float()
        if not needs.isdisjoint({"local", "local_logits"}):
            patches = self.value_embedding(tokens, full) if local == "value" else self.local_embedding(full)
            if "local" in needs:
                out["local"] = _finish(patches, normalize)
            if "local_logits" in needs:
                out["local_logits"] = self.logits(patches).float()
        return out

    def encode_image(self, x: Tensor, *, normalize: bool = True) -> Tensor:
        """Image embeddings, float32 [B, d], unit norm unless `normalize=False`.

        Args:
            x: transformed images [B, 3, H, W] on any device.
            normalize: False gives the raw embedding.
        """
        return self.encode(x, {"image"}, normalize=normalize)["image"]

    def encode_dense(self, x: Tensor, local: str = "value", *, normalize: bool = True) -> tuple[Tensor, Tensor]:
        """Image embeddings [B, d] and local features [B, P, d] in row-major order of `grid`, float32.

        Args:
            x: transformed images [B, 3, H, W] on any device.
            local: "value" or "tokens", see `encode`.
            normalize: unit norm.
        """
        out = self.encode(x, {"image", "local"}, local=local, normalize=normalize)
        return out["image"], out["local"]

    def encode_logits(self, x: Tensor) -> Tensor:
        """Logits of the classifier head, float32 [B, C].

        Raises:
            UsageError: the backbone has no classifier head.
        """
        return self.encode(x, {"logits"})["logits"]

    def _run_last_block(self, tokens: Tensor) -> Tensor:
        return self.last_block(tokens) if "blocks" in self.capabilities else tokens

    def prepare(self, x: Tensor) -> Tensor:
        """Transformed images [B, 3, H, W], looked at once, on the backbone's device and in its precision.

        Raises:
            ValueError: another shape than the transform gives, or NaN.
        """
        height, width = self.transform.crop
        if not isinstance(x, Tensor) or x.ndim != 4 or list(x.shape[1:]) != [3, height, width]:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"Images must be a tensor [B, 3, {height}, {width}], as backbone.transform gives them; got {shape}."
            )
        if not x.isfinite().all():
            raise ValueError("Images hold NaN or infinite values: pass what backbone.transform gives.")
        return x.to(self.device, self.dtype)

    # ---- texts

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], *, normalize: bool = True, warn: bool = True) -> Tensor:
        """Text embeddings, float32 [C, d], unit norm unless `normalize=False`.

        With a causal mask the pass is cut behind the last end mark, which changes nothing. Texts already encoded
        by this backbone come from memory. Texts longer than the tower reads lose their end, which is said.

        Args:
            texts: full prompts, at least one.
            normalize: False gives the raw embedding.
            warn: False for callers that look at `cut_texts` themselves.
        """
        self.require("text")
        texts = _text_list(texts)
        state = [self.fingerprint, str(self.device), str(self.dtype), texts]
        key = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        if key not in self.texts_seen:
            chunks = [texts[i : i + self._prompt_chunk] for i in range(0, len(texts), self._prompt_chunk)]
            if warn:
                self._warn_of_cuts(texts)
            self.texts_seen = dict(list(self.texts_seen.items())[-7:])
            self.texts_seen[key] = torch.cat([self._encode_text_chunk(chunk) for chunk in chunks])
        return _finish(self.texts_seen[key].clone(), normalize)

    def cut_texts(self, texts: Sequence[str]) -> list[int]:
        """Indices of the texts that are longer than the text tower reads, so that `encode_text` drops their end.

        Example:
            >>> from ood_core import create_backbone
            >>> create_backbone("tiny").cut_texts(["a dog", "a dog " * 20])
            [1]
        """
        # A token stands for a byte at least; cleaning may write one character as up to three.
        doubtful = [i for i, text in enumerate(texts) if 3 * len(text.encode()) + 3 > self.context_length]
        if self.tokenizer is None or not self.context_length or not doubtful:
            return []
        counts = _token_counts(self.tokenizer, [texts[i] for i in doubtful])
        return [i for i, count in zip(doubtful, counts, strict=True) if count > self.context_length]

    def same_texts(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """Pairs of indices of texts that the text tower cannot tell apart: they have the same tokens."""
        if self.tokenizer is None:
            return []
        first: dict[bytes, int] = {}
        rows = [row.numpy().tobytes() for row in self.tokenize(list(texts))]
        return [(first[row], i) for i, row in enumerate(rows) if first.setdefault(row, i) != i]

    def _warn_of_cuts(self, texts: list[str]) -> None:
        if cut := self.cut_texts(texts):
            named = ", ".join(repr(texts[index]) for index in cut[:3])
            more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
            log.warning(
                "The text tower of %s reads %d tokens; the end of %s%s is cut.",
                *(self.spec, self.context_length, named, more),
            )

    def _encode_text_chunk(self, texts: list[str]) -> Tensor:
        embeddings, end = self.embed_texts(texts)
        return self.project_text(self.text_hidden(embeddings, end)).float()

    def embed_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings [N, L, D] without positions, and the end positions [N]."""
        ids = self.tokenize(texts).to(self.device)
        end = self.end_positions(ids)
        ids = ids[:, : int(end.max()) + 1]  # exact: no token sees what comes behind it
        return self.embed_tokens(ids), end

    def text_hidden(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """[N, D] from token embeddings [N, L, D], read at position `end` [N], before the text projection."""
        x = self.add_positions(embeddings)
        for layer in self.layers("text", x.shape[1])[:-1]:
            x = layer(x)
        return self.text_tail(x, end)

    def text_tail(self, tokens: Tensor, end: Tensor) -> Tensor:
        """The last text block and the norm behind it, for the tokens that are read; gradients flow.

        Args:
            tokens: input tokens [N, L, D] of the last text block.
            end: index int64 [N] of the token that is read as a text's embedding.

        Returns:
            [N, D], before `text_projection`.
        """
        last = self.layers("text", tokens.shape[1])[-1]
        # Of the last block only the end marks are read, so its MLP, two thirds of its work, sees no other token.
        read = last.parts.attend(tokens)[torch.arange(len(tokens), device=tokens.device), end]
        return self.text_norm(last.parts.feed_forward(read))

    def encode_prompts(
        self,
        context: Tensor,
        class_names: Sequence[str],
        *,
        projection: Tensor | None = None,
        max_batch: int | None = None,
    ) -> Tensor:
        """Embeddings of learned prompts, float32 [C, d], unit norm; gradients reach `context` and `projection`.

        The prompt of a class is [start][context][class name][.][end]. An empty name gives a prompt without a class
        word (a negative prompt). The pass is cut behind the last end mark, which changes nothing (causal mask).

        Args:
            context: [C, n, D] per class or [n, D] shared, D the width of the token embedding.
            class_names: C names; underscores are spaces.
            projection: [D, d] in place of the model's own `text_projection`.
            max_batch: with more prompts than this, the activations of a pass are not kept for the gradient but
                computed again, so that those of at most `max_batch` prompts are ever in memory.

        Raises:
            ValueError: shapes that do not fit, or a name too long for the text tower's context.
        """
        self.require("prompts")
        names = [name.replace("_", " ") for name in _text_list(class_names, empty=True)]
        if context.ndim == 2:
            context = context.expand(len(names), -1, -1)
        words, end = self.prompt_words(tuple(names))
        if context.ndim != 3 or len(context) != len(names) or context.shape[-1] != words.shape[-1]:
            raise ValueError(
                f"context must be [n, {words.shape[-1]}] or [{len(names)}, n, {words.shape[-1]}], "
                f"got {list(context.shape)}."
            )
        end = end + context.shape[1]
        if int(end.max()) >= self.context_length:
            longest = names[int(end.argmax())]
            raise ValueError(
                f"Class name {longest!r} with {context.shape[1]} context tokens needs {int(end.max()) + 1} tokens; the "
                f"text tower takes {self.context_length}. Shorten the name or the context."
            )
        context = context.to(self.device, words.dtype)
        order = end.argsort(stable=True)  # prompts of like length together: little is padded
        encode: Any = self._encode_prompt_chunk
        if max_batch is not None and max_batch < len(names):
            encode = partial(checkpoint, encode, use_reentrant=False)
        size = min(max_batch or len(names), _PROMPTS)
        features = torch.cat([encode(context[i], words[i], end[i], projection) for i in order.split(size)])
        return F.normalize(features[order.argsort()], dim=-1)

    def prompt_words(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Token embeddings [C, L, D] of "NAME." and their end positions [C], kept for the next step of a training."""
        key = (self.fingerprint, str(self.device), str(self.dtype), names)
        if key not in self._words:
            with torch.no_grad():
                words, end = self.embed_texts([f"{name}." for name in names])
            self._words = dict(list(self._words.items())[-3:]) | {key: (words, end)}
        return self._words[key]

    def _encode_prompt_chunk(self, context: Tensor, words: Tensor, end: Tensor, projection: Tensor | None) -> Tensor:
        prompts = torch.cat([words[:, :1], context, words[:, 1:]], 1)
        hidden = self.text_hidden(prompts[:, : int(end.max()) + 1], end)
        if projection is None:
            features = self.project_text(hidden)
        else:
            features = hidden.to(projection.dtype) @ projection.to(hidden.device)
        return features if features.dtype == torch.float64 else features.float()

    # ---- weights

    def save(self, folder: str | Path) -> str:
        """Write the weights (safetensors) in the format of the model's own library.

        Args:
            folder: made where it is missing.

        Returns:
            A sentence that says how to load them.
        """
        file = Path(folder) / "model.safetensors"
        tensors = {name: value.contiguous().clone() for name, value in self.model.state_dict().items()}
        write_atomically(file, lambda path: save_file(tensors, path))
        return f"Saved: {file}, for load_state_dict of the same architecture."

    def linears(self) -> list[str]:
        """Names that `linear` takes, bottom layer first."""
        return [linear.name for linear in self._linears()]

    def linear(self, name: str) -> NamedLinear:
        """One weight by name, e.g. "visual.11.up" or "text.3.query".

        Raises:
            UsageError: an unknown name; the message lists the nearest known ones.
        """
        found = {linear.name: linear for linear in self._linears()}
        if name not in found:
            raise unknown_name("weight", name, found)
        return found[name]

    def _named(
        self, tower: str, layer: str, weights: dict[str, nn.Parameter | tuple[nn.Parameter, slice]]
    ) -> Iterator[NamedLinear]:
        for kind, place in weights.items():
            parameter, rows = place if isinstance(place, tuple) else (place, None)
            yield NamedLinear(f"{tower}.{layer}.{kind}", parameter, rows, on_change=self._record_edit)

    def _record_edit(self, linear: NamedLinear, before: Tensor) -> None:
        now = hash_tensors([(linear.name, linear.weight)])
        original, _ = self.edits.get(linear.name) or (hash_tensors([(linear.name, before)]), "")
        self.edits[linear.name] = (original, now)
        if now == original:
            del self.edits[linear.name]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of architecture and weights; changes with an edit and returns when it is undone."""
        edits = sorted((name, now) for name, (_, now) in self.edits.items())
        added = [sorted({key for _, key in self.added.values()})] if self.added else []
        return hashlib.sha256(json.dumps([self._hash, edits, *added]).encode()).hexdigest()

    # ---- capabilities

    def check_needs(self, needs: Collection[str]) -> frozenset[str]:
        """The features asked for, once it is sure that this backbone has them.

        Raises:
            UsageError: an unknown feature, or one the backbone does not have.
        """
        known = [*FEATURES, *self.added]
        if unknown := set(needs) - set(known):
            raise unknown_name("feature", sorted(unknown)[0], known)
        self.require(*sorted(needs))
        return frozenset(needs)

    def require(self, *capabilities: str) -> None:
        """Raise a `UsageError` that names other backbones unless all `capabilities` are there."""
        for capability in (part for name in capabilities for part in _MADE_OF.get(name, (name,))):
            if capability not in self.capabilities:
                raise self._lacks(capability)

    def _lacks(self, capability: str) -> UsageError:
        return UsageError(
            f"Backbone {self.spec!r} has no {capability!r} (it has {', '.join(sorted(self.capabilities))}). "
            f"Use {_EXAMPLES.get(capability, 'another backbone')}."
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec} d={self.width} grid={self.grid} {self.dtype} on {self.device}>"


def _finish(features: Tensor, normalize: bool) -> Tensor:
    return F.normalize(features.float(), dim=-1) if normalize else features.float()


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text with its marks, before anything is cut."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps those of transformers
    if not hasattr(inner, "pad_token_id"):
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    clean = getattr(tokenizer, "clean_fn", str)
    marked = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # open_clip sets three marks of its own
    ids = inner([clean(text) for text in texts], add_special_tokens=not marked, truncation=False, verbose=False)
    return [len(row) + 3 * marked for row in ids["input_ids"]]


def _text_list(texts: Sequence[str], *, empty: bool = False) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"Texts must be a list of strings, got {texts!r}.")
    if not texts or not (empty or all(text.strip() for text in texts)):
        raise ValueError(f"Texts must be at least one non-empty string, got {list(texts)!r}.")
    return list(texts)


def hash_tensors(named: Iterable[tuple[str, Tensor]], architecture: str = "") -> str:
    """sha256 (hex) of named tensors, their shapes and types, and of a text that belongs to them."""
    digest = hashlib.sha256(architecture.encode())
    for name, tensor in named:
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
