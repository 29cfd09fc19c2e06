"""Options of the search and of SeTAR+FT, declared once: their groups, defaults and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ood_core.options import Options, integer, one_of, option, optional

from ood_setar.objective import OBJECTIVES, SCORERS

__all__ = ["KINDS", "ORDERS", "RATIOS", "Candidates", "Criterion", "Passes", "Training"]

RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
ORDERS = ("visual_text", "text_visual", "visual_only", "text_only", "interleaved", "exhaustive")
KINDS = ("query", "key", "value", "out", "up", "down", "projection")


def _candidates(name: str, ratios: Sequence[float]) -> tuple[float, ...]:
    """In rising order, 0 among them."""
    found = sorted({0.0, *(float(ratio) for ratio in ratios)})
    if wrong := [ratio for ratio in found if not 0 <= ratio < 1]:
        raise ValueError(f"ratio={wrong[0]:g} is outside [0, 1): candidates are shares, 5 % is 0.05.")
    if len(found) < 2:
        raise ValueError("ratios holds nothing but 0: give shares of singular values to try, such as 0.1.")
    return tuple(found)


@dataclass(frozen=True)
class Candidates(Options):
    """What a search tries, in which order.

    Attributes:
        kind: of weight: "query", "key", "value", "out", "up", "down" or "projection".
        order: "visual_text" (default; "visual_only" for classifiers), "text_visual", "visual_only", "text_only",
            "interleaved" (a block of each tower in turn) or "exhaustive" (the best of all undecided weights first).
        include_projection: try the tower's projection first, before its blocks.
        ratios: candidates in [0, 1); 0, the weight as it is, is always among them.
        drop: "minor", "principal" or "random" singular values.
        seed: of `drop="random"`.
    """

    kind: str = option("up", one_of(*KINDS))
    order: str | None = option(None, optional(one_of(*ORDERS)))
    include_projection: bool = False
    ratios: Sequence[float] = option(RATIOS, _candidates)
    drop: str = option("minor", one_of("minor", "principal", "random"))
    seed: int = 5


@dataclass(frozen=True)
class Criterion(Options):
    """What a search minimises; see `Objective`.

    Attributes:
        objective: "loss", or "auroc", "aupr", "fpr95" of `scorer` between images and their pseudo-OOD cells.
        scorer: "mcm", "gl_mcm" or "energy".
        ood_weight: lambda, factor of the OOD part of the loss.
        k: a cell is pseudo-OOD if its class is not among its k largest logits; None: 0.3 C, rounded.
        temperature: of the scores; None: the logit scale, so that plain cosines are compared (1 for a classifier).
        loss_batch: images that the loss pools its cells over, in the order of the source.
    """

    objective: str = option("loss", one_of(*OBJECTIVES))
    scorer: str = option("mcm", one_of(*SCORERS))
    ood_weight: float = 0.1
    k: int | None = None
    temperature: float | None = None
    loss_batch: int = option(512, integer(1))


@dataclass(frozen=True)
class Passes(Options):
    """How the network is run in a search, which changes nothing of what it finds.

    Attributes:
        batch_size: images per pass.
        memory: bytes for kept activations, per tower; with less, more is computed again.
    """

    batch_size: int = 64
    memory: int = 4 << 30


@dataclass(frozen=True)
class Training(Options):
    """How the dropped directions are trained.

    Attributes:
        epochs: passes over the images.
        batch_size: images per step.
        learning_rate: of SGD at the start; a cosine takes it to 0, step by step.
        momentum: of SGD.
        weight_decay: of SGD.
        crop_scale: smallest share of an image's area in an augmented view.
        jitter: brightness, contrast and saturation of a view are changed by factors from 1 - jitter to 1 + jitter.
        augment: random crop, flip and jitter in every epoch; off, every epoch sees the same pixels.
        seed: of the order, the views and what stochastic depth drops.
    """

    epochs: int = option(5, integer(1))
    batch_size: int = option(100, integer(1))
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_scale: float = 0.9
    jitter: float = 0.0
    augment: bool = True
    seed: int = 5
