"""A linear probe: multinomial logistic regression on frozen image features, the baseline of HVL and MoFE."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor

from ood_core import check, functional
from ood_core.detectors.base import Detector
from ood_core.detectors.logits import check_trainable, unsaturated_msp
from ood_core.features import FeatureSet
from ood_core.logistic import fit_logistic

__all__ = ["L2_GRID", "LinearProbe", "hold_out"]

log = logging.getLogger(__name__)

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Penalties tried, strongest first: for unit-norm features from almost class means to almost no penalty."""

_SCORERS = {
    "msp": unsaturated_msp,
    "max_logit": functional.max_logit,
    "energy": functional.energy,
    "gen": functional.gen,
}
# Where no class has an image to spare for choosing.
_UNCHOSEN_L2 = 1e-4


class LinearProbe(Detector):
    """Multinomial logistic regression on image features, and a score of its logits.

    Needs no text tower, so it is the baseline for every backbone. Classes without an image are left out.

    Args:
        scorer: "msp" (as the detector `msp`), "max_logit", "energy" or "gen", of `ood_core.functional`.
        l2: strength of the penalty, see `fit_logistic`; None: the one of `L2_GRID` with the smallest loss on a fifth
            of each class held out, then fitted on all images.
        seed: of the images held out.
        **common: see `create_detector`.

    Example:
        >>> probe = create_detector("linear_probe", scorer="gen").fit(train)  # doctest: +SKIP
        >>> probe.score_features(test), probe.predict(test), float(probe.state["l2"])  # doctest: +SKIP
    """

    name = "linear_probe"
    least_classes: ClassVar[int] = 2
    fit_options = frozenset({"l2", "seed"})

    def __init__(self, *, scorer: str = "msp", l2: float | None = None, seed: int = 0, **common: Any) -> None:
        super().__init__(**common)
        self.scorer = check.choice("scorer", scorer, tuple(_SCORERS))
        self.l2 = l2 if l2 is None else check.positive("l2", l2)
        self.seed = check.integer("seed", seed, 0, 2**63 - 1)

    def _fit(self, features: FeatureSet) -> None:
        x, labels = features.image.double(), self._class_labels(features)
        check_trainable(x, labels, self.class_names)
        present, labels = labels.unique(return_inverse=True)
        if len(present) < len(self.class_names):
            log.warning("%d classes have no image and are left out.", len(self.class_names) - len(present))
            self.class_names = [self.class_names[i] for i in present]
        l2 = self.l2 or _choose_l2(x, labels, len(present), self.seed)
        weight, bias = fit_logistic(x, labels, len(present), l2=l2)
        self.state = {"weight": weight.float(), "bias": bias.float(), "l2": torch.tensor(l2, dtype=torch.float64)}

    def logits(self, features: FeatureSet) -> Tensor:
        """Logits [N, C] in the order of `class_names`."""
        weight, bias = (self.state[name].to(features.image.device) for name in ("weight", "bias"))
        return features.image @ weight.T + bias

    def _score(self, features: FeatureSet) -> Tensor:
        return _SCORERS[self.scorer](self.logits(features))

    def _predict(self, features: FeatureSet) -> Tensor:
        return self.logits(features).argmax(1)


def hold_out(labels: Tensor, seed: int) -> Tensor:
    """A fifth of every class, at least one image of it, none of a class with a single image; bool [N].

    Example:
        >>> hold_out(torch.tensor([0, 0, 1]), seed=0).sum()
        tensor(1)
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        count = max(1, len(rows) // 5) if len(rows) > 1 else 0
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return held


def _choose_l2(x: Tensor, labels: Tensor, classes: int, seed: int) -> float:
    """The penalty with the smallest held-out cross-entropy, the stronger of equals."""
    held = hold_out(labels.cpu(), seed)
    if not held.any():
        log.warning("No class has a second image to choose the penalty on: l2=%g is taken.", _UNCHOSEN_L2)
        return _UNCHOSEN_L2
    best, smallest, fitted = L2_GRID[0], float("inf"), None
    for l2 in L2_GRID:
        fitted = fit_logistic(x[~held], labels[~held], classes, l2=l2, start=fitted, tolerance=1e-5)
        weight, bias = (value.to(x.device) for value in fitted)
        loss = torch.nn.functional.cross_entropy(x[held] @ weight.T + bias, labels[held].to(x.device)).item()
        if loss < smallest:
            best, smallest = l2, loss
    return best
