"""Energy: the logsumexp of the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ood_core import check, functional
from ood_core.detectors.logits import LogitDetector
from ood_core.features import FeatureSet

__all__ = ["Energy"]


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
