"""IIM's options, declared once: their groups, defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass

from ood_core import check
from ood_core.options import Options, integer, one_of, option, optional

__all__ = ["Losses", "Matching", "Prompts", "Scoring", "Training"]


@dataclass(frozen=True)
class Matching(Options):
    """S-MCM: global, patch-to-class and class-to-patch matches.

    Attributes:
        k: (patch, class) entries averaged in the score; None: 50 if the grid has at least 100 patches, else a
            quarter of them.
        temperature: divides the cosines of the score.
        alpha: factor of the class-to-patch term.
    """

    k: int | None = option(None, optional(integer(1)))
    temperature: float = option(1.0, check.positive)
    alpha: float = option(1.0, check.factor)


@dataclass(frozen=True)
class Scoring(Matching):
    """S-MCM with negative prompts; see `Matching` for its other options.

    Attributes:
        negatives: "use" or "ignore" the negative prompts in the score (S-MCM or S-MCM*).
        form: of the score with negatives, "paper" or "released".
    """

    negatives: str = option("use", one_of("use", "ignore"))
    form: str = option("paper", one_of("paper", "released"))


@dataclass(frozen=True)
class Losses(Options):
    """What the prompts are trained on: L_pos + lambda_neg L_neg + lambda_div L_div (Eq. 11).

    Attributes:
        train_k: positive patches per class in the losses; None as for `k`.
        train_temperature: divides the cosines in the losses; None: the inverse of the model's logit scale (0.01 for
            CLIP), as the released code; 1: the T of the paper's text.
        loss_form: of the negative loss, "paper" or "released".
        region: hard negatives, "next" (ranks k + 1 to 2k) or "all" (k + 1 to P).
        hard_negative_mining: other classes and negatives are read at their own best patches.
        lambda_neg: factor of the negative loss.
        lambda_div: factor of the diversity loss.
    """

    train_k: int | None = option(None, optional(integer(1)))
    train_temperature: float | None = option(None, optional(check.positive))
    loss_form: str = option("paper", one_of("paper", "released"))
    region: str = option("next", one_of("next", "all"))
    hard_negative_mining: bool = True
    lambda_neg: float = option(5.0, check.factor)
    lambda_div: float = option(0.5, check.factor)


@dataclass(frozen=True)
class Prompts(Options):
    """The prompts that are learned.

    Attributes:
        negative_prompts: C_n, their number; 0 for none.
        context_length: learned tokens per prompt.
        shared_context: one context for all classes.
        context_init: words that contexts start from, instead of random vectors.
        train_text_projection: learn the text tower's last linear map, too.
        max_prompt_batch: prompts whose activations may be in memory at a time.
    """

    negative_prompts: int = option(300, integer(0))
    context_length: int = option(16, integer(1))
    shared_context: bool = False
    context_init: str | None = None
    train_text_projection: bool = True
    max_prompt_batch: int | None = option(512, optional(integer(1)))


@dataclass(frozen=True)
class Training(Options):
    """How the prompts learn.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: of SGD, peak of the schedule.
        momentum: of SGD.
        weight_decay: of SGD.
        views: when fitted on images: augmented views encoded once and used in turn; 0 for new ones every epoch.
        crop_scale: smallest share of the image's area in a view.
        seed: of the start, the order and the views.
    """

    epochs: int = option(50, integer(1))
    batch_size: int = option(32, integer(1))
    learning_rate: float = option(2.5e-4, check.positive)
    momentum: float = option(0.9, check.factor)
    weight_decay: float = option(5e-4, check.factor)
    views: int = option(0, integer(0))
    crop_scale: float = option(0.85, check.share)
    seed: int = option(1, integer(0))
