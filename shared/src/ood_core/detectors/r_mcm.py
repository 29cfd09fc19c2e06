"""R-MCM: MCM of the image and of its best patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ood_core import check, functional
from ood_core.detectors.zero_shot import ZeroShot, default_k
from ood_core.features import FeatureSet

__all__ = ["RMCM"]


class RMCM(ZeroShot):
    """Regional MCM without negatives (R-MCM*); near its bound in exact order (see `functional.unsaturated_match`).

    Args:
        k: (patch, class) entries averaged; None: 50 if the grid has at least 100 patches, else a quarter of them.
        temperature: divides the cosines.
        **common: see `create_detector`.
    """

    name = "r_mcm"
    capabilities = frozenset({"image", "local", "text"})

    def __init__(self, *, k: int | None = None, temperature: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.k = k if k is None else check.integer("k", k, 1, 2**31)
        self.temperature = check.positive("temperature", temperature)

    @property
    def needs(self) -> frozenset[str]:
        """Image and local features."""
        return frozenset({"image", "local"})

    def _score(self, features: FeatureSet) -> Tensor:
        matched = (features.image, features.local, self._text(features))
        k = default_k(self.k, features.local.shape[1])
        score = functional.r_mcm(*matched, k=k, temperature=self.temperature)
        return functional.unsaturated_match(score, *matched, k=k, temperature=self.temperature)
