"""What detectors share that read class logits, wherever these come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ood_core import check, functional
from ood_core.backbones.base import Backbone
from ood_core.detectors.base import Detector
from ood_core.errors import DataError
from ood_core.features import FeatureSet
from ood_core.logistic import fit_logistic

__all__ = ["LogitDetector", "check_trainable", "unsaturated_msp"]

_HEADS = ("auto", "zero_shot", "probe", "classifier")


def check_trainable(x: Tensor, labels: Any, class_names: list[str]) -> None:
    """Refuse features [N, d] and labels [N] that no linear probe can learn from.

    Raises:
        DataError: a single class, or features that are all the same.
    """
    if len(set(labels.tolist())) < 2:
        only = class_names[labels[0]]
        raise DataError(f"A linear probe needs at least two classes; the images are all {only!r}.")
    if (x == x[0]).all():
        raise DataError(f"All {len(x)} training features are the same: there is nothing to tell the classes apart by.")


def unsaturated_msp(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`functional.msp`, with the order of the log-odds above .999."""
    score = functional.msp(logits, temperature=temperature)
    return functional.unsaturated(score, functional.log_remaining(logits, temperature=temperature))


class LogitDetector(Detector):
    """Base of detectors on logits, wherever these come from.

    Args:
        head: "zero_shot" (scaled cosines to the class texts), "probe" (a linear probe learned by `fit`),
            "classifier" (the backbone's own head), or "auto": the first of zero_shot (a text tower and class names),
            classifier, probe that the backbone allows.
        probe_c: inverse strength of the probe's L2 penalty.
        **common: see `create_detector`.
    """

    fit_options = frozenset({"head", "probe_c"})

    def __init__(self, *, head: str = "auto", probe_c: float = 10.0, **common: Any) -> None:
        super().__init__(**common)
        self.head = check.choice("head", head, _HEADS)
        self.probe_c = check.positive("probe_c", probe_c)

    @property
    def needs(self) -> frozenset[str]:
        """Logits of a classifier, else image features."""
        return frozenset({"logits"} if self.head == "classifier" else {"image"})

    @property
    def fitted(self) -> bool:
        """Whether the head's weights are known."""
        return self.head == "classifier" or "weight" in self.state

    def _attach(self, backbone: Backbone) -> None:
        if self.head == "auto":
            self.head = self._choose(backbone)
        super()._attach(backbone)
        if self.head == "classifier" and not self.class_names:
            self.class_names = list(backbone.label_names or [])
        if self.head == "zero_shot" and "weight" not in self.state:
            self.state["weight"] = backbone.logit_scale * self._class_texts(backbone)
            self.state["bias"] = torch.zeros(len(self.class_names))

    def _choose(self, backbone: Backbone) -> str:
        if "text" in backbone.capabilities and self.class_names:
            return "zero_shot"
        return "classifier" if "logits" in backbone.capabilities else "probe"

    def _fit(self, features: FeatureSet) -> None:
        if self.head in ("auto", "probe"):
            self.head = "probe"
            self._fit_probe(features)

    def _fit_probe(self, features: FeatureSet) -> None:
        x, labels = features.image.double(), self._class_labels(features)
        check_trainable(x, labels, self.class_names)
        present, labels = labels.unique(return_inverse=True)
        # scikit-learn's `LogisticRegression(C=probe_c)`: with two classes it penalises their difference, which is
        # twice as long as either row.
        rows = 2 if len(present) == 2 else 1
        weight, bias = fit_logistic(x, labels, len(present), l2=rows / (self.probe_c * len(x)))
        self.class_names = [self.class_names[i] for i in present]
        self.state = {"weight": weight.float(), "bias": bias.float()}

    def logits(self, features: FeatureSet) -> Tensor:
        """Logits [N, C] in the order of `class_names`."""
        if self.head == "classifier":
            return features.logits
        weight, bias = (self.state[name].to(features.image.device) for name in ("weight", "bias"))
        return features.image @ weight.T + bias
