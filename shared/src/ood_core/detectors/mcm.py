"""MCM: the softmax probability of the nearest class text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ood_core import check
from ood_core.detectors.logits import unsaturated_msp
from ood_core.detectors.zero_shot import ZeroShot
from ood_core.features import FeatureSet

__all__ = ["MCM"]


class MCM(ZeroShot):
    """Maximum concept matching; above .999 in the order of the log-odds (see `functional.unsaturated`).

    Args:
        temperature: divides the cosines.
        **common: see `create_detector`.
    """

    name = "mcm"

    def __init__(self, *, temperature: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.temperature = check.positive("temperature", temperature)

    def _score(self, features: FeatureSet) -> Tensor:
        return unsaturated_msp(features.image @ self._text(features).T, temperature=self.temperature)
