"""MaxLogit: the largest logit."""

from __future__ import annotations

from torch import Tensor

from ood_core import functional
from ood_core.detectors.logits import LogitDetector
from ood_core.features import FeatureSet

__all__ = ["MaxLogit"]


class MaxLogit(LogitDetector):
    """The largest logit (options: see `LogitDetector`)."""

    name = "max_logit"

    def _score(self, features: FeatureSet) -> Tensor:
        return functional.max_logit(self.logits(features))
