"""MSP: the probability of the most likely class."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ood_core import check
from ood_core.detectors.logits import LogitDetector, unsaturated_msp
from ood_core.features import FeatureSet

__all__ = ["MSP"]


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
