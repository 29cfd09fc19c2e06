"""Detectors that read class logits: MSP, MaxLogit, Energy, GEN."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_core import check, functional
from ood_core.backbones.base import Backbone
from ood_core.detectors.base import Detector
from ood_core.errors import DataError
from ood_core.features import FeatureSet

__all__ = ["GEN", "MSP", "Energy", "LogitDetector", "MaxLogit", "unsaturated_msp"]

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
        from sklearn.linear_model import LogisticRegression

        labels = self._class_labels(features).numpy()
        check_trainable(features.image, labels, self.class_names)
        classes = np.unique(labels)
        probe = LogisticRegression(C=self.probe_c, max_iter=2000).fit(features.image.double().numpy(), labels)
        weight, bias = probe.coef_, probe.intercept_
        if len(classes) == 2:  # scikit-learn keeps one row for two classes
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        self.class_names = [self.class_names[i] for i in classes]
        # Contiguous, as it will be loaded: products differ in the last bits with the order in memory.
        self.state = {"weight": torch.from_numpy(weight).float().contiguous(), "bias": torch.from_numpy(bias).float()}

    def logits(self, features: FeatureSet) -> Tensor:
        """Logits [N, C] in the order of `class_names`."""
        if self.head == "classifier":
            return features.logits
        weight, bias = (self.state[name].to(features.image.device) for name in ("weight", "bias"))
        return features.image @ weight.T + bias


class MSP(LogitDetector):
    """Maximum softmax probability; above .999, where float32 would round it to 1, in the order of the log-odds.

    A score above 1 is therefore no mistake: it says how little is left to 1 (see `functional.unsaturated`).

    Args:
        temperature: divides the logits.
        head: see `LogitDetector`.
        probe_c: see `LogitDetector`.
        **common: see `create_detector`.
    """

    name = "msp"
    least_classes: ClassVar[int] = 2

    def __init__(self, *, temperature: float = 1.0, head: str = "auto", probe_c: float = 10.0, **common: Any) -> None:
        super().__init__(head=head, probe_c=probe_c, **common)
        self.temperature = check.positive("temperature", temperature)

    def _score(self, features: FeatureSet) -> Tensor:
        return unsaturated_msp(self.logits(features), temperature=self.temperature)


class MaxLogit(LogitDetector):
    """The largest logit (options: see `LogitDetector`)."""

    name = "max_logit"

    def _score(self, features: FeatureSet) -> Tensor:
        return functional.max_logit(self.logits(features))


class Energy(LogitDetector):
    """Negative free energy.

    Args:
        temperature: divides the logits and multiplies the logsumexp.
        head: see `LogitDetector`.
        probe_c: see `LogitDetector`.
        **common: see `create_detector`.
    """

    name = "energy"

    def __init__(self, *, temperature: float = 1.0, head: str = "auto", probe_c: float = 10.0, **common: Any) -> None:
        super().__init__(head=head, probe_c=probe_c, **common)
        self.temperature = check.positive("temperature", temperature)

    def _score(self, features: FeatureSet) -> Tensor:
        return functional.energy(self.logits(features), temperature=self.temperature)


class GEN(LogitDetector):
    """Generalised entropy.

    Args:
        gamma: exponent in (0, 1).
        top: how many of the largest probabilities count.
        head: see `LogitDetector`.
        probe_c: see `LogitDetector`.
        **common: see `create_detector`.
    """

    name = "gen"
    least_classes: ClassVar[int] = 2

    def __init__(
        self, *, gamma: float = 0.1, top: int = 100, head: str = "auto", probe_c: float = 10.0, **common: Any
    ) -> None:
        super().__init__(head=head, probe_c=probe_c, **common)
        self.gamma, self.top = gamma, check.integer("top", top, 1, 2**31)

    def _score(self, features: FeatureSet) -> Tensor:
        return functional.gen(self.logits(features), gamma=self.gamma, top=self.top)
