"""MoFE's options, declared once: their groups, defaults and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ood_core import check, functional
from ood_core.detectors.logits import unsaturated_msp
from ood_core.errors import UsageError
from ood_core.options import Options, integer, one_of, option, optional

from ood_mofe.functional import unsaturated_atd, unsaturated_ctw
from ood_mofe.partition import GROUPINGS

__all__ = ["LOGIT_SCORES", "TEXT_SCORES", "Mixing", "Mixture", "Routing", "Scoring", "Training"]

LOGIT_SCORES = {"msp": unsaturated_msp, "max_logit": functional.max_logit, "energy": functional.energy}
TEXT_SCORES = {"atd": unsaturated_atd, "ctw": unsaturated_ctw}
_HEAD_SCORES = ("others", "mos")


def _path(name: str, value: Any) -> str | None:
    return None if value is None else str(value)


def _groups(name: str, value: Any) -> dict[str, Any] | str | None:
    return dict(value) if isinstance(value, Mapping) else _path(name, value)


@dataclass(frozen=True)
class Scoring(Options):
    """How images are scored and classified, once the experts are trained.

    Attributes:
        scorer: "knn" (distance to the k-th nearest training feature), "msp", "max_logit" or "energy" (of the global
            head, or of the expert's head where there is none), "others" (1 - probability of "others" in the expert's
            head), "mos" (minimum of "others" over all heads), "atd" or "ctw" (CLIPN's, with `texts`; "atd" without
            them is "others").
        k: neighbour of "knn"; None: 50, but no more than the classes of the training images have (their median), since
            farther neighbours are of other classes. A smaller bank uses its farthest entry and says so.
        bank: "expert" compares with the training images of the same expert, "global" with all.
        head: that predicts the class, "expert" or "global"; None: the expert's where one is learned.
        texts: .npz file with CLIPN's text features {yes: [C, d], no: [C, d]} in the order of the classes.
        classifier: "linear", heads are learned; or "text", for CLIP: classes are told apart by their texts as in
            zero-shot classification (the "yes" of `texts`, else the class names in `template`), and of the heads
            only "others" is learned; cosines count with the backbone's own logit scale.
    """

    scorer: str = option("knn", one_of("knn", *LOGIT_SCORES, *_HEAD_SCORES, *TEXT_SCORES))
    k: int | None = option(None, optional(integer(1)))
    bank: str = option("expert", one_of("expert", "global"))
    head: str | None = option(None, one_of(None, "expert", "global"))
    texts: str | Path | None = option(None, _path)
    classifier: str = option("linear", one_of("linear", "text"))


@dataclass(frozen=True)
class Mixture(Options):
    """The experts: how many, of which blocks, and for which classes.

    Attributes:
        experts: their number E.
        expert_layers: last blocks that have experts; an image goes through the same expert in each.
        unfreeze_blocks: blocks below them that are trained, too.
        grouping: how classes are divided, see `assign_groups`.
        groups: class -> group, or a CSV file of them, see `assign_groups`.
        moe: off, all classes share one copy of the last block (the last `expert_layers`).
        group_heads: without `moe`: a head with "others" for every group of classes, as MOS has; else a head over all.
    """

    experts: int = option(7, integer(1))
    expert_layers: int = option(1, integer(1))
    unfreeze_blocks: int = option(0, integer(0))
    grouping: str = option("auto", one_of(*GROUPINGS))
    groups: Mapping[str, Any] | str | Path | None = option(None, _groups)
    moe: bool = True
    group_heads: bool = False


@dataclass(frozen=True)
class Routing(Options):
    """How an image finds its experts, and what they give (Eq. 3-7).

    Attributes:
        router_norm: "layer_norm" (without parameters) or "none", of the router's input.
        router_reads: "class", the class token, or "patches", the mean of the patch tokens.
        gate: "none" takes the expert's result as it is; "literal" weights the experts' whole results by the router's
            probabilities, as Eq. 7 is written; "prob" so weights only what they add to the class token; "renorm" does
            with the probabilities divided by their sum over the `top_k`. An expert of several layers counts as a whole.
            With one expert "literal" differs from "none" in the length of the class token only, which the final norm
            takes away again; the experts then start at the backbone's features in both.
        top_k: experts per image; more than one needs a gate. Heads and banks are those of the first.
        tokens: "cls" computes the class token alone in the last layer, "all" the whole block; they agree.
    """

    router_norm: str = option("layer_norm", one_of("layer_norm", "none"))
    router_reads: str = option("class", one_of("class", "patches"))
    gate: str = option("none", one_of("none", "literal", "prob", "renorm"))
    top_k: int = option(1, integer(1))
    tokens: str = option("cls", one_of("cls", "all"))

    def check(self, experts: int) -> None:
        """Refuse what no network of so many experts can do.

        Raises:
            ValueError: more experts per image than there are.
            UsageError: several experts per image without weights.
        """
        check.integer("top_k", self.top_k, 1, experts, "the number of experts")
        if self.top_k > 1 and self.gate == "none":
            raise UsageError(
                f"top_k={self.top_k} experts need weights: pass gate='renorm', gate='prob' or gate='literal'."
            )


@dataclass(frozen=True)
class Mixing(Options):
    """Dynamic-beta Mixup, and what keeps features small.

    Attributes:
        mixup: train on mixed images, too.
        dynamic: mix the less, the more accurate a class is (Dynamic-beta); off is plain mixup.
        accuracy_weight: w, how much the accuracy counts.
        reg: "l2" keeps features small, "ls" smooths the labels of mixed images, "none" does neither.
        reg_on: features that "l2" is on, "pre_norm" (in units of their mean square at the start) or "post_norm".
        reg_weight: eta, factor of "l2"; `reg_on` says in which unit.
        smoothing: of "ls".
    """

    mixup: bool = True
    dynamic: bool = True
    accuracy_weight: float = option(0.8, check.factor)
    reg: str = option("l2", one_of("l2", "ls", "none"))
    reg_on: str = option("pre_norm", one_of("pre_norm", "post_norm"))
    reg_weight: float = option(0.1, check.factor)
    smoothing: float = option(0.1, check.part)


@dataclass(frozen=True)
class Training(Options):
    """How the experts learn; the paper does not give the recipe.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step, and as many mixed ones.
        learning_rate: of AdamW for the trained blocks and the final norm, peak of the schedule.
        head_learning_rate: for router and heads.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        augment: random crop and flip, new in every epoch.
        crop_scale: smallest share of the image's area in a crop.
        validation: share of each class's images that is held out to measure its accuracy, at most 50 images.
        cache_limit: bytes of images and tokens that training may keep in memory.
        seed: of router, heads, order, views and mixes.
    """

    epochs: int = option(10, integer(1))
    batch_size: int = option(256, integer(1))
    learning_rate: float = option(1e-5, check.positive)
    head_learning_rate: float = option(1e-3, check.positive)
    weight_decay: float = option(0.05, check.factor)
    clip: float = option(1.0, check.positive)
    augment: bool = True
    crop_scale: float = option(0.5, check.share)
    validation: float = option(0.1, check.part)
    cache_limit: float = 4e9
    seed: int = option(0, integer(0))
