"""GL-MCM: MCM of the image and of its best patch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ood_core import check, functional
from ood_core.backbones.base import Backbone
from ood_core.detectors.zero_shot import ZeroShot
from ood_core.features import FeatureSet

__all__ = ["GLMCM"]

# Images at a time whose patches' logits are looked at.
_FEW = 32


class GLMCM(ZeroShot):
    """Global-local maximum concept matching; near its bound in exact order (see `functional.unsaturated_match`).

    Args:
        temperature: divides the cosines, or a classifier's logits.
        local_weight: factor of the local term, at least 0.
        head: "zero_shot" (cosines to the class texts), "classifier" (logits of the backbone's own head, on the image
            and on every patch), or "auto": the classifier where the backbone has one and no text tower.
        **common: see `create_detector`.
    """

    name = "gl_mcm"
    capabilities = frozenset({"image", "local", "text"})
    fit_options = frozenset({"head"})

    def __init__(
        self, *, temperature: float = 1.0, local_weight: float = 1.0, head: str = "auto", **common: Any
    ) -> None:
        super().__init__(**common)
        self.temperature = check.positive("temperature", temperature)
        self.local_weight = 0.0 if local_weight == 0 else check.positive("local_weight", local_weight)
        self.head = check.choice("head", head, ("auto", "zero_shot", "classifier"))

    @property
    def needs(self) -> frozenset[str]:
        """Features of image and patches; their logits of a classifier."""
        return frozenset({"logits", "local_logits"} if self.head == "classifier" else {"image", "local"})

    @property
    def fitted(self) -> bool:
        """Whether the class texts are encoded; a classifier has its head."""
        return self.head == "classifier" or super().fitted

    def _chosen_head(self, backbone: Backbone) -> str:
        if self.head != "auto":
            return self.head
        classifier = "logits" in backbone.capabilities and "text" not in backbone.capabilities
        return "classifier" if classifier else "zero_shot"

    def _asks(self, backbone: Backbone) -> frozenset[str]:
        """Logits of a classifier, or images and texts."""
        classifier = self._chosen_head(backbone) == "classifier"
        return frozenset({"logits", "local_logits"}) if classifier else super()._asks(backbone)

    def _attach(self, backbone: Backbone) -> None:
        self.head = self._chosen_head(backbone)
        if self.head == "zero_shot":
            super()._attach(backbone)
            return
        backbone.require(*sorted(self._asks(backbone)))
        self.class_names = self.class_names or list(backbone.label_names or [])

    def _predict(self, features: FeatureSet) -> Tensor | None:
        return None if self.head == "classifier" else super()._predict(features)

    def _score(self, features: FeatureSet) -> Tensor:
        options: dict[str, Any] = {"temperature": self.temperature, "local_weight": self.local_weight}
        if self.head == "classifier":
            # Patches times classes are many numbers: few images at a time.
            parts = zip(features.logits.split(_FEW), features.local_logits.split(_FEW), strict=True)
            return torch.cat([_unsaturated_of_logits(*part, **options) for part in parts])
        matched = (features.image, features.local, self._text(features))
        return functional.unsaturated_match(functional.gl_mcm(*matched, **options), *matched, k=1, **options)


def _unsaturated_of_logits(image: Tensor, local: Tensor, *, temperature: float, local_weight: float) -> Tensor:
    """`functional.gl_mcm_logits`, near its bound in exact order."""
    score = functional.gl_mcm_logits(image, local, temperature=temperature, local_weight=local_weight)
    remaining = functional.log_remaining(image, temperature=temperature)
    if local_weight:
        cells = functional.log_remaining(local.flatten(0, 1), temperature=temperature).view(local.shape[:2])
        remaining = remaining.logaddexp(cells.amin(-1) + math.log(local_weight))
    return functional.unsaturated(score, remaining, bound=1 + local_weight)
