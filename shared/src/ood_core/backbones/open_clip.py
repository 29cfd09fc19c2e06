"""CLIP models of the open_clip library (OpenAI's, LAION's, the embedded tiny one)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from ood_core.backbones.attention_pool import pooled_tower
from ood_core.backbones.base import Backbone, BlockParts, Layer
from ood_core.backbones.linear import NamedLinear, fused_qkv
from ood_core.backbones.loading import unwrapped
from ood_core.backbones.open_clip_models import build, image_transform
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import UsageError

__all__ = ["OpenCLIPBackbone", "image_transform", "load_open_clip"]


class OpenCLIPBackbone(Backbone):
    """Any open_clip model: plain vision transformers with everything, other towers with image and text.

    Towers that pool with attention (CLIP's ResNets, SigLIP, CoCa) have local features through their pool's value path,
    too; for them `local="tokens"` is the same, as nothing else leads from a patch to the embedding.

    Args:
        model: `open_clip.CLIP` or `CustomTextCLIP`.
        tokenizer: texts to padded token ids [N, context length].
        transform: the model's image transform.
        spec: name for messages and results.
    """

    def __init__(
        self, model: Any, tokenizer: Callable[..., Tensor], transform: ImageTransform, *, spec: str = "open_clip"
    ) -> None:
        model = unwrapped(model)
        super().__init__(model, transform, spec=spec)
        self.tokenizer = tokenizer
        self.visual: Any = model.visual
        self.text: Any = getattr(model, "text", model)
        self.logit_scale = float(model.logit_scale.exp())
        if getattr(model, "logit_bias", None) is not None:
            self.logit_bias = float(model.logit_bias)
        capabilities = {"image", "text"}
        self._pooled = pooled_tower(self.visual)
        if self._is_plain_transformer():
            capabilities |= {"local", "blocks"}
            self.grid = tuple(self.visual.grid_size)
            self.width = self.visual.output_dim
        elif self._pooled is not None:
            capabilities.add("local")
            self.grid = self._pooled.grid
        self._causal = _is_causal(self.text)
        self.context_length = getattr(tokenizer, "context_length", 0)
        if self._causal:
            capabilities.add("prompts")
            self.context_length = self.text.context_length
        self.capabilities = frozenset(capabilities)
        if "blocks" not in capabilities:
            self.width = _output_width(lambda x: self.image_embedding(self.embed(x)), transform, model.logit_scale)

    def _twin(self, model: nn.Module) -> Self:
        return type(self)(model, self.tokenizer, self.transform, spec=self.spec)

    def _is_plain_transformer(self) -> bool:
        visual = self.visual
        return (
            isinstance(visual, VisionTransformer)
            and visual.attn_pool is None
            and all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks)
        )

    # ---- images

    def embed(self, x: Tensor) -> Tensor:
        """Input tokens of the first block [B, 1 + P, D].

        What the pool reads for a tower that pools with attention; the image embedding itself for other towers.
        """
        if "blocks" in self.capabilities:
            return self.visual._embeds(x)
        return _first(self.visual(x)) if self._pooled is None else self._pooled.tokens(x)

    def layers(self, tower: str = "visual", length: int | None = None) -> list[Layer]:
        """Blocks of a plain image tower or a causal text tower."""
        if tower == "visual":
            return _layers("visual", self.visual, None) if "blocks" in self.capabilities else []
        return _layers("text", self.text, self.text.attn_mask[:length, :length]) if self._causal else []

    @property
    def reads_class_token(self) -> bool:
        """Whether the image tower pools its class token."""
        return "blocks" in self.capabilities and self.visual.pool_type == "tok"

    @property
    def last_block(self) -> nn.Module:
        """The last residual attention block."""
        self.require("blocks")
        return self.visual.transformer.resblocks[-1]

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the projection."""
        self.require("blocks")
        return self.visual.ln_post

    def image_embedding(self, tokens: Tensor) -> Tensor:
        if "blocks" not in self.capabilities:
            return tokens if self._pooled is None else self._pooled.image(tokens)
        return self.project(self.visual._pool(tokens)[0])

    @property
    def pools_by_attention(self) -> bool:
        """Whether the tower's embedding is an attention pool over all its tokens."""
        return self._pooled is not None

    def pool_values(self, tokens: Tensor) -> Tensor:
        return self.local_embedding(tokens)

    def local_embedding(self, tokens: Tensor) -> Tensor:
        if self._pooled is not None:
            return self._pooled.local(tokens)
        return self.project(self.visual.ln_post(tokens[:, 1:]))

    def project(self, x: Tensor) -> Tensor:
        return x if self.visual.proj is None else x @ self.visual.proj

    # ---- texts

    def tokenize(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def end_positions(self, ids: Tensor) -> Tensor:
        if _pool_type(self.text) == "eos":
            return (ids == _eos_id(self.text)).int().argmax(-1)
        return ids.argmax(-1)

    def _encode_text_chunk(self, texts: list[str]) -> Tensor:
        if "prompts" in self.capabilities:
            return super()._encode_text_chunk(texts)
        # A bidirectional tower (SigLIP's) or another library's reads the padding too: nothing can be cut.
        return self.model.encode_text(self.tokenize(texts).to(self.device), normalize=False).float()

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.text.token_embedding(ids)

    def add_positions(self, embeddings: Tensor) -> Tensor:
        return embeddings + self.text.positional_embedding[: embeddings.shape[1]]

    def text_norm(self, hidden: Tensor) -> Tensor:
        return self.text.ln_final(hidden)

    def project_text(self, hidden: Tensor) -> Tensor:
        projection = self.text.text_projection
        if projection is None:
            return hidden
        return projection(hidden) if isinstance(projection, nn.Linear) else hidden @ projection

    @property
    def text_projection(self) -> Tensor:
        """The last linear map of the text tower, [D, d]."""
        projection = self.text.text_projection
        if projection is None or getattr(projection, "bias", None) is not None:
            raise UsageError(f"The text tower of {self.spec!r} has no text projection, or one with a bias, to train.")
        return projection.weight.T if isinstance(projection, nn.Linear) else projection

    # ---- weights

    def _linears(self) -> Iterator[NamedLinear]:
        for tower, owner in (("visual", self.visual), ("text", self.text)):
            for layer, block in enumerate(getattr(getattr(owner, "transformer", None), "resblocks", ())):
                if isinstance(block, ResidualAttentionBlock):
                    yield from self._named(tower, str(layer), _block_weights(block))
        if "blocks" in self.capabilities and self.visual.proj is not None:
            yield self._projection("visual.projection", self.visual.proj)
        text: Any = getattr(self.text, "text_projection", None)
        if isinstance(text, nn.Linear):
            yield NamedLinear("text.projection", text.weight, on_change=self._record_edit)
        elif text is not None:
            yield self._projection("text.projection", text)

    def _projection(self, name: str, parameter: nn.Parameter) -> NamedLinear:
        return NamedLinear(name, parameter, transposed=True, on_change=self._record_edit)


def _layers(tower: str, owner: Any, mask: Tensor | None) -> list[Layer]:
    return [_layer(f"{tower}.{index}", block, mask) for index, block in enumerate(owner.transformer.resblocks)]


def _layer(name: str, block: Any, mask: Tensor | None) -> Layer:
    attn, width = block.attn, block.attn.embed_dim

    def value(x: Tensor) -> Tensor:
        return F.linear(x, attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :])

    plain = type(block) is ResidualAttentionBlock
    attention = partial(_attention, block, mask) if plain else partial(block.attention, attn_mask=mask)
    parts = BlockParts(block.ln_1, attention, value, attn.out_proj, block.ln_2, block.mlp, block.ls_1, block.ls_2)
    return Layer(name, parts if plain else partial(block, attn_mask=mask), parts, block)


def _attention(block: Any, mask: Tensor | None, x: Tensor) -> Tensor:
    """The block's attention of tokens [N, L, D].

    Trained on a CPU it is written out: PyTorch's module multiplies once per token, not once per batch, and its fused
    kernel is slow backward, most in bfloat16.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return block.attention(x, attn_mask=mask)
    attn = block.attn
    fused = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    query, key, value = fused.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (query * attn.head_dim**-0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return attn.out_proj((weights @ value).transpose(1, 2).flatten(2))


def _block_weights(block: Any) -> dict[str, Any]:
    return fused_qkv(block.attn.in_proj_weight) | {
        "out": block.attn.out_proj.weight,
        "up": block.mlp.c_fc.weight,
        "down": block.mlp.c_proj.weight,
    }


def _pool_type(text: Any) -> str:
    return str(getattr(text, "text_pool_type", None) or getattr(text, "pool_type", ""))


def _eos_id(text: Any) -> int:
    return text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id


def _is_causal(text: Any) -> bool:
    """Whether a text tower is a causal transformer read at its end mark."""
    mask = getattr(text, "attn_mask", None)
    return mask is not None and getattr(text, "cls_emb", None) is None and _pool_type(text) in ("argmax", "eos")


@torch.no_grad()
def _output_width(embed: Callable[[Tensor], Tensor], transform: ImageTransform, like: Tensor) -> int:
    return embed(torch.zeros(1, 3, *transform.crop).to(like)).shape[-1]


def _first(out: Any) -> Tensor:
    """The embedding of a tower that may give its tokens, too."""
    return out[0] if isinstance(out, tuple) else out


def load_open_clip(name: str, *, spec: str) -> OpenCLIPBackbone:
    """Load "ARCHITECTURE/TAG", "ARCHITECTURE/FILE", "ARCHITECTURE" (random), "local-dir:FOLDER" or "hf-hub:NAME".

    Raises:
        UsageError: an unknown architecture or tag, with the nearest known ones.
        MissingDataError: weights that cannot be fetched, or a file or folder that is not there.
        DataError: weights that do not belong to the architecture, or a damaged file.
    """
    model, tokenizer, transform, decisions = build(name, spec=spec)
    backbone = OpenCLIPBackbone(model, tokenizer, transform, spec=spec)
    backbone.decisions = decisions
    return backbone
