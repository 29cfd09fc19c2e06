"""What detectors share that are trained epoch by epoch: labels, the recipe of a checkpoint, the record of losses."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ood_core.data import open_source
from ood_core.data.sources import Images, ImageSource
from ood_core.detectors.base import Detector, backbone_of
from ood_core.errors import DataError
from ood_core.features import FeatureSet
from ood_core.files import json_writer
from ood_core.options import Options
from ood_core.training import Keeping

__all__ = ["Run", "TrainedDetector", "described"]


@dataclass(frozen=True)
class Run(Options):
    """How a training runs, which changes nothing of what it learns; see `TrainedDetector.fit_images`."""

    checkpoint: str | Path | None = None
    resume: bool = True
    cache: str | Path | None = None
    workers: int = 0
    progress: bool | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """For `extract`."""
        return {"cache": self.cache, "workers": self.workers, "progress": self.progress}

    def keeping(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """For `ood_core.training.train`, with everything that a training depends on."""
        return {"keeping": Keeping(self.checkpoint, self.resume, recipe), "progress": self.progress}


class TrainedDetector(Detector):
    """Base of detectors that learn from labelled images, or their features, with `ood_core.training.train`.

    Attributes:
        history: per epoch the terms of the loss.
    """

    least_classes: ClassVar[int] = 2

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.history: list[dict[str, float]] = []

    @abstractmethod
    def _learn(self, images: FeatureSet | ImageSource, labels: Tensor, run: Run) -> None:
        """Train on images with these labels [N], indices into `class_names`; keep what was learned in `state`."""

    def fit_features(
        self,
        features: FeatureSet,
        *,
        checkpoint: str | Path | None = None,
        resume: bool = True,
        progress: bool | None = None,
    ) -> Self:
        """Learn from features of labelled ID images; forgets an earlier fit and calibration.

        Args:
            features: of the ID training images, with labels.
            checkpoint: file that keeps what is learned after every epoch.
            resume: go on from it.
            progress: a bar on stderr; None shows it on a terminal only.

        Raises:
            UsageError: a method that changes the backbone; features that lack what the method needs, or of another
                backbone; too few classes.
            DataError: labels that are missing or unknown, features that are NaN or infinite, or a loss that is no
                longer finite.
        """
        if self.changes_backbone:
            return super().fit_features(features)  # which refuses
        self._check_features(features)
        return self._train(features, Run(checkpoint, resume, progress=progress))

    def fit_images(
        self,
        images: Images,
        *,
        checkpoint: str | Path | None = None,
        resume: bool = True,
        cache: str | Path | None = None,
        workers: int = 0,
        progress: bool | None = None,
    ) -> Self:
        """Learn from labelled ID images; forgets an earlier fit and calibration.

        Args:
            images: a source, a folder, ...
            checkpoint: file that keeps what is learned after every epoch.
            resume: go on from it.
            cache: folder for features that are computed once.
            workers: processes that decode images, which changes nothing else; 0 decodes in this one.
            progress: a bar on stderr; None shows it on a terminal only.

        Raises:
            UsageError: no backbone, or one without what the method needs; too few classes.
            DataError: labels that are missing or unknown, or a loss that is no longer finite.
        """
        return self._train(open_source(images), Run(checkpoint, resume, cache, workers, progress))

    def _train(self, images: FeatureSet | ImageSource, run: Run) -> Self:
        backbone_of(self)
        self._learn(images, self._class_labels(described(images)), run)
        self._remember(images)
        self.calibration = None
        return self

    def _recipe(self, images: FeatureSet | ImageSource, fingerprint: str) -> dict[str, Any]:
        """Everything a training depends on, for its checkpoint: options, classes, backbone and images."""
        told = described(images)
        labels = None if told.labels is None else told.labels.tolist()
        extracted = isinstance(images, FeatureSet)
        content = json.dumps([extracted, told.source, told.ids, labels, told.label_names])
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


def described(images: FeatureSet | ImageSource) -> FeatureSet:
    """Ids and labels of images, without features."""
    if isinstance(images, FeatureSet):
        return images
    return FeatureSet(
        ids=list(images.ids),
        labels=None if images.labels is None else torch.as_tensor(images.labels),
        label_names=list(images.label_names),
        source=images.fingerprint,
    )
