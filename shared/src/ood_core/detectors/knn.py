"""kNN: the distance to the nearest ID training features."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ood_core import check, functional
from ood_core.detectors.base import Detector
from ood_core.features import FeatureSet

__all__ = ["KNN"]

log = logging.getLogger(__name__)


class KNN(Detector):
    """Minus the distance to the k-th nearest ID training feature.

    Args:
        k: rank of the neighbour; None: 50, but no more than the classes of the training images have (their median),
            since farther neighbours are of other classes. A smaller bank uses its farthest entry and says so.
        **common: see `create_detector`.
    """

    name = "knn"
    fit_options = frozenset({"k"})

    def __init__(self, *, k: int | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.k = k if k is None else check.integer("k", k, 1, 2**31)

    def _fit(self, features: FeatureSet) -> None:
        k = self.k or min(50, _median_class_size(features))
        if len(features) < k:
            log.warning("knn: k=%d is more than the bank's %d images, which is used instead.", k, len(features))
        self.state = {"bank": features.image.clone(), "k": torch.tensor(min(k, len(features)))}

    def _score(self, features: FeatureSet) -> Tensor:
        return functional.knn(features.image, self.state["bank"].to(features.image.device), k=int(self.state["k"]))


def _median_class_size(features: FeatureSet) -> int:
    if features.labels is None:
        return len(features)
    return int(features.labels.unique(return_counts=True)[1].median())
