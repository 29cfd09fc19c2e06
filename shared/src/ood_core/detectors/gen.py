"""GEN: the generalised entropy of the largest probabilities."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ood_core import check, functional
from ood_core.detectors.logits import LogitDetector
from ood_core.features import FeatureSet

__all__ = ["GEN"]


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
