"""What detectors share that are trained epoch by epoch: labels, the recipe of a checkpoint, the record of losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ood_core.data.sources import ImageSource
from ood_core.detectors.base import Detector
from ood_core.errors import DataError
from ood_core.features import FeatureSet
from ood_core.files import json_writer

__all__ = ["TrainedDetector"]


class TrainedDetector(Detector):
    """Base of detectors that learn from labelled images, or their features, with `ood_core.training.train`.

    Attributes:
        history: per epoch the terms of the loss.
    """

    least_classes: ClassVar[int] = 2

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.history: list[dict[str, float]] = []

    def _training_labels(self, images: FeatureSet | ImageSource) -> Tensor:
        """Labels int64 [N] as indices into `class_names`."""
        labels = self._class_labels(_described(images))
        self._remember(images)
        return labels

    def _recipe(self, images: FeatureSet | ImageSource, fingerprint: str) -> dict[str, Any]:
        """Everything a training depends on, for its checkpoint: options, classes, backbone and images."""
        described = _described(images)
        labels = None if described.labels is None else described.labels.tolist()
        extracted = isinstance(images, FeatureSet)
        content = json.dumps([extracted, described.source, described.ids, labels, described.label_names])
        return {
            **{name: getattr(self, name) for name in sorted(self.fit_options)},
            "class_names": self.class_names,
            "backbone": fingerprint,
            "images": hashlib.sha256(content.encode()).hexdigest(),
        }

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        return {"training.json": json_writer(self.history)}

    @classmethod
    def _empty(cls, path: Path, config: dict[str, Any]) -> Self:
        made = super()._empty(path, config)
        file = path / "training.json"
        if file.is_file():  # a repository on the hub is fetched without it
            try:
                made.history = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{file} is no record of a training ({error}): remove it.") from error
        return made


def _described(images: FeatureSet | ImageSource) -> FeatureSet:
    """Ids and labels of images, without features."""
    if isinstance(images, FeatureSet):
        return images
    return FeatureSet(
        ids=list(images.ids),
        labels=None if images.labels is None else torch.as_tensor(images.labels),
        label_names=list(images.label_names),
        source=images.fingerprint,
    )
