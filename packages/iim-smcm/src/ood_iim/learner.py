"""The prompts that IIM learns: a context per class, negative prompts, and the text projection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ood_core.backbones.base import Backbone
from ood_core.errors import UsageError
from torch import Tensor, nn

from ood_iim.functional import diversity_loss, negative_loss, positive_loss

__all__ = ["PromptLearner", "learning_rate"]


def learning_rate(epoch: int, *, peak: float, epochs: int, warmup: float = 1e-5) -> float:
    """The released schedule: one epoch of warm-up, then a cosine that starts its count after it.

    Args:
        epoch: from 0.
        peak: rate of the second epoch.
        epochs: length of the cosine.
        warmup: rate of the first epoch (never above `peak`).

    Example:
        >>> [f"{learning_rate(e, peak=2.5e-4, epochs=50):.3g}" for e in (0, 1, 49)]
        ['1e-05', '0.00025', '9.86e-07']
    """
    if epoch == 0 and epochs > 1:
        return min(warmup, peak)
    return peak * (1 + math.cos(math.pi * max(0, epoch - 1) / epochs)) / 2


class PromptLearner(nn.Module):
    """Learned contexts and text projection in front of a frozen text tower ("Method" in the paper).

    Args:
        backbone: a CLIP-like model with "prompts".
        class_names: C names.
        negatives: M, number of negative prompts; 0 for none.
        context_length: learned tokens per prompt.
        shared_context: one context for all classes instead of one each.
        context_init: words that the class contexts start from ("a photo of a"), in place of random vectors; their
            number of tokens is then the context length.
        train_text_projection: learn the last linear map of the text tower, too.
        max_prompt_batch: bounds the memory, see `max_batch` of `Backbone.encode_prompts`.
        seed: of the random start.

    Attributes:
        context: [C, n, D], or [n, D] if shared.
        negative_context: [M, n, D].
        text_projection: [D, d].

    Raises:
        UsageError: a backbone whose prompts cannot be learned, or `context_init` without a word.
        ValueError: a class name too long for the text tower's context.

    Example:
        >>> from ood_core import create_backbone
        >>> learner = PromptLearner(create_backbone("tiny"), ["dog", "cat"], negatives=3)
        >>> [x.shape for x in learner()]
        [torch.Size([2, 192]), torch.Size([3, 192])]
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        negatives: int = 300,
        context_length: int = 16,
        shared_context: bool = False,
        context_init: str | None = None,
        train_text_projection: bool = True,
        max_prompt_batch: int | None = 512,
        seed: int = 1,
    ) -> None:
        super().__init__()
        backbone.require("prompts")
        self.backbone, self.names, self.max_prompt_batch = backbone, list(class_names), max_prompt_batch
        projection = backbone.text_projection.detach()
        real = torch.float64 if projection.dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(seed)
        words = None if context_init is None else _word_embeddings(backbone, context_init)
        length = context_length if words is None else len(words)
        contexts = () if shared_context else (len(self.names),)
        width = projection.shape[0]

        def normal(*shape: int) -> Tensor:
            return 0.02 * torch.randn(*shape, generator=generator, dtype=real)

        start = normal(*contexts, length, width)
        if words is not None:
            start = words.to(real).cpu().expand_as(start).clone()
        self.context = nn.Parameter(start)
        self.negative_context = nn.Parameter(normal(negatives, length, width))
        self.text_projection = nn.Parameter(projection.to("cpu", real).clone(), requires_grad=train_text_projection)
        self.to(backbone.device)
        with torch.no_grad():
            self()  # names that are too long show here, not after an epoch

    def learned(self) -> dict[str, nn.Parameter]:
        """What the optimiser changes, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad and value.numel()}

    def forward(self) -> tuple[Tensor, Tensor]:
        """Class texts [C, d] and negative texts [M, d], unit norm."""
        classes = len(self.names)
        context = self.context if self.context.ndim == 3 else self.context.expand(classes, -1, -1)
        features = self.backbone.encode_prompts(
            torch.cat([context, self.negative_context]),
            [*self.names, *[""] * len(self.negative_context)],
            projection=self.text_projection,
            max_batch=self.max_prompt_batch,
        )
        return features[:classes], features[classes:]

    def losses(
        self,
        local: Tensor,
        labels: Tensor,
        *,
        k: int,
        lambda_neg: float = 5.0,
        lambda_div: float = 0.5,
        form: str = "paper",
        region: str = "next",
        hard_negative_mining: bool = True,
        temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms of the total loss L_pos + lambda_neg L_neg + lambda_div L_div (Eq. 11).

        Args:
            local: patch features [B, P, d], unit norm.
            labels: int64 [B].
            k: positive patches per class.
            lambda_neg: factor of `negative_loss`; 0 leaves it out.
            lambda_div: factor of `diversity_loss`; 0 leaves it out.
            form: of `negative_loss`.
            region: of `negative_loss`.
            hard_negative_mining: of `positive_loss`.
            temperature: divides the cosines; None: the inverse of the model's logit scale.
        """
        text, negatives = self()
        if not (text.isfinite().all() and negatives.isfinite().all()):
            return {"positive": text.sum() + negatives.sum()}  # not finite: the training loop says so and stops
        local, scale = local.to(text), self.backbone.logit_scale if temperature is None else 1 / temperature
        logits, negative_logits = (scale * F.linear(local, prompts) for prompts in (text, negatives))
        labels = labels.to(text.device)
        terms = {
            "positive": positive_loss(logits, negative_logits, labels, k=k, hard_negative_mining=hard_negative_mining)
        }
        if lambda_neg and len(negatives):
            terms["negative"] = lambda_neg * negative_loss(
                logits, negative_logits, labels, k=k, form=form, region=region
            )
        if lambda_div:
            terms["diversity"] = lambda_div * diversity_loss(text, negatives if len(negatives) else None)
        return terms

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Take over learned tensors of the same names; shapes that differ are refused with both."""
        own = dict(self.named_parameters())
        for name, value in tensors.items():
            if value.shape != own[name].shape:
                raise UsageError(
                    f"{name} is {list(value.shape)}, but {len(self.names)} classes on {self.backbone.spec!r} need "
                    f"{list(own[name].shape)}: it was learned for another class list, backbone or option."
                )
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)


def _word_embeddings(backbone: Backbone, words: str) -> Tensor:
    """Token embeddings [n, D] of some words, without start and end marks."""
    ids = backbone.tokenize([words.replace("_", " ")]).to(backbone.device)
    end = int(backbone.end_positions(ids)[0])
    if end < 2:
        raise UsageError(f"context_init={words!r} holds no word: give some, such as 'a photo of a', or None.")
    with torch.no_grad():
        return backbone.embed_tokens(ids)[0, 1:end]
