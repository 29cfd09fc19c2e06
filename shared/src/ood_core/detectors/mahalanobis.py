"""Mahalanobis: the distance to the nearest class mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ood_core import functional
from ood_core.detectors.base import Detector
from ood_core.errors import DataError
from ood_core.features import FeatureSet

__all__ = ["Mahalanobis"]

# Of sums over float32 features, relative: less than this is no scatter.
_ROUNDING = 1e-6


class Mahalanobis(Detector):
    """Minus the Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    Args:
        shrinkage: "ledoit_wolf" (a share of the identity chosen from the data, right for few images), or a share
            in [0, 1].
        **common: see `create_detector`.
    """

    name = "mahalanobis"
    fit_options = frozenset({"shrinkage"})

    def __init__(self, *, shrinkage: str | float = "ledoit_wolf", **common: Any) -> None:
        super().__init__(**common)
        if shrinkage != "ledoit_wolf" and not (isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1):
            raise ValueError(f"shrinkage={shrinkage!r} must be 'ledoit_wolf' or a share in [0, 1].")
        self.shrinkage = shrinkage

    def _fit(self, features: FeatureSet) -> None:
        from sklearn.covariance import LedoitWolf, ShrunkCovariance

        labels, x = self._class_labels(features), features.image.double()
        present = labels.unique()
        means = torch.stack([x[labels == label].mean(0) for label in present])
        centred = _scatter(x, means[torch.searchsorted(present, labels)]).numpy()
        adaptive = self.shrinkage == "ledoit_wolf"
        estimator = LedoitWolf if adaptive else ShrunkCovariance
        options = {} if adaptive else {"shrinkage": self.shrinkage}
        precision = estimator(assume_centered=True, **options).fit(centred).get_precision()
        self.state = {"means": means, "precision": torch.from_numpy(precision)}

    def _score(self, features: FeatureSet) -> Tensor:
        means, precision = (self.state[name].to(features.image.device) for name in ("means", "precision"))
        return functional.mahalanobis(features.image.double(), means, precision)


def _scatter(x: Tensor, means: Tensor) -> Tensor:
    """Deviations [N, d] of features from their class means, if there are any beyond rounding."""
    centred = x - means
    if centred.norm() <= _ROUNDING * x.norm():
        raise DataError(
            f"No class has two different images among the {len(x)} to fit on, so nothing says how much images of one "
            "class differ: give at least two images per class, or use 'knn'."
        )
    return centred
