"""A detector fitted on generated images, with all that its checks share."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ood_core.backbones import create_backbone
from ood_core.backbones.base import FEATURES, Backbone, hash_tensors
from ood_core.data import ImageFolder, scenes
from ood_core.detectors import create_detector, detector_class
from ood_core.detectors.base import Detector, backbone_of
from ood_core.detectors.zero_shot import ZeroShot
from ood_core.evaluation import Evaluation, evaluate
from ood_core.features import FeatureSet, extract

__all__ = ["CLASSES", "Factory", "Fitted", "Refitted", "Subject", "Workbench", "files", "workbench"]

CLASSES = sorted(scenes.ID_CLASSES[:3])

Factory = Callable[..., Detector]
"""(class_names=, template=, ** options) -> a detector, not fitted: a class of detectors is one."""


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Workbench:
    """A backbone, folders of images and their features, each made when it is first asked for."""

    def __init__(self, backbone: Backbone | str) -> None:
        # Checks compare the last digits, so in one precision on every machine.
        self.backbone = create_backbone(backbone, dtype="float32") if isinstance(backbone, str) else backbone
        self.by_spec = isinstance(backbone, str)
        self._temporary = tempfile.TemporaryDirectory(prefix="ood-testing-")
        self._features: dict[tuple[str, str, frozenset[str]], FeatureSet] = {}

    @property
    def cache(self) -> Path:
        """For features whose last bits do not matter: with the place in memory they change in sums."""
        return Path(self._temporary.name) / "cache"

    def new_folder(self) -> Path:
        """An empty folder that lives as long as this object."""
        return Path(tempfile.mkdtemp(dir=self._temporary.name))

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Three classes to fit on, to calibrate on and to score; two to fit on before; and noise."""
        sets = {
            "train": scenes.render(CLASSES, 8, seed=1),
            "held": scenes.render(CLASSES, 7, seed=2),
            "test": scenes.render(CLASSES, 3, seed=3),
            "earlier": scenes.render(CLASSES[1:], 7, seed=4),
            "noise": scenes.noise(9),
        }
        root = self.new_folder()
        return {name: scenes.write_folder(made, root / name) for name, made in sets.items()}

    def read(self, detector: Detector, name: str) -> FeatureSet:
        """Features of a set for a detector; those of the plain backbone are extracted once for all detectors."""
        backbone = backbone_of(detector)
        plain = detector.needs <= set(FEATURES)
        needs = detector.needs | (backbone.capabilities & {"image", "local"}) if plain else detector.needs
        key = backbone.fingerprint, name, needs
        if key not in self._features:
            self._features[key] = extract(backbone, self.folders[name], needs)
        return self._features[key]

    def images_to_fit(self, detector: Detector, name: str) -> FeatureSet | ImageFolder:
        """A set as the detector learns from it: its features, or images for one that changes the backbone."""
        return ImageFolder(self.folders[name]) if detector.changes_backbone else self.read(detector, name)

    def fit(self, detector: Detector, name: str) -> Detector:
        """Fit on a set."""
        return detector.fit(self.images_to_fit(detector, name))


@cache
def workbench(backbone: Backbone | str) -> Workbench:
    """The workbench of a backbone, one for all detectors."""
    return Workbench(backbone)


class Fitted(NamedTuple):
    """A fitted and calibrated detector with the features of every set, and where it was saved before and after."""

    detector: Detector
    features: dict[str, FeatureSet]
    fitted: Path
    calibrated: Path

    def scores(self, name: str) -> Tensor:
        """Scores of a set."""
        return self.detector.score_features(self.features[name])


class Refitted(NamedTuple):
    """A detector that `evaluate` fitted on two classes, then fitted on all three; the world before and after."""

    detector: Detector
    evaluation: Evaluation
    scores: Tensor
    threshold: float | None
    before: dict[str, Any]
    after: dict[str, Any]


class Subject:
    """A detector under check."""

    def __init__(self, detector: str | Factory, backbone: Backbone | str, options: dict[str, Any]) -> None:
        self._detector, self._backbone, self._options = detector, backbone, options

    @cached_property
    def bench(self) -> Workbench:
        """Images and backbone."""
        return workbench(self._backbone)

    @cached_property
    def kind(self) -> type[Detector]:
        """The class of the detector."""
        if isinstance(self._detector, str):
            return detector_class(self._detector)
        return self._detector if isinstance(self._detector, type) else type(self._detector())

    @property
    def name(self) -> str:
        """As in the registry."""
        return self.kind.name

    @property
    def learns(self) -> bool:
        """Whether images teach it anything; the others must be told the class names."""
        return not issubclass(self.kind, ZeroShot)

    def make(self, class_names: Any = None) -> Detector:
        """One with the options given, on those of the demo if it goes by name; without a backbone."""
        if isinstance(self._detector, str):
            options = {**self.kind.demo_options, **self._options}
            return create_detector(self._detector, class_names=class_names, **options)
        return self._detector(class_names=class_names, **self._options)

    def create(self, backbone: Backbone, class_names: list[str] = CLASSES) -> Detector:
        """An unfitted one; class names that are learned are those of the labels."""
        made = self.make(None if self.learns else class_names)
        made.attach(backbone)
        return made

    @cached_property
    def ready(self) -> Fitted:
        """It, fitted and calibrated."""
        bench, root = self.bench, self.bench.new_folder()
        detector = bench.fit(self.create(bench.backbone), "train")
        detector.save_pretrained(root / "fitted")
        features = {name: bench.read(detector, name) for name in bench.folders}
        detector.calibrate(features["held"], 0.9).save_pretrained(root / "calibrated")
        return Fitted(detector, features, root / "fitted", root / "calibrated")

    @cached_property
    def refitted(self) -> Refitted:
        """Another one, on a backbone that somebody left unfrozen."""
        bench, folders = self.bench, self.bench.folders
        backbone, class_names = bench.backbone.copy(), list(CLASSES)
        backbone.model.train()
        next(backbone.model.parameters()).requires_grad_(True)
        before = _world(backbone, folders, class_names)
        detector = self.create(backbone, class_names)
        sets: dict[str, Any] = {"id": folders["test"], "ood": {"noise": folders["noise"]}, "calibrate": folders["held"]}
        evaluation = evaluate({self.name: detector}, fit=folders["earlier"], **sets, cache=bench.cache)
        scores, threshold = detector.score_features(bench.read(detector, "test")), detector.threshold
        bench.fit(detector, "train")
        return Refitted(detector, evaluation, scores, threshold, before, _world(backbone, folders, class_names))


def _world(backbone: Backbone, folders: dict[str, Path], class_names: list[str]) -> dict[str, Any]:
    """What a fit must leave as it was."""
    model = backbone.model
    return {
        "weights": hash_tensors(model.state_dict().items(), ""),
        "training mode": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "device": {parameter.device for parameter in model.parameters()},
        "random numbers": [
            torch.get_rng_state().tolist(),
            random.getstate(),
            [np.array(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
        ],
        "grad mode": torch.is_grad_enabled(),
        "images": {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folders["train"].parent)},
        "class names": list(class_names),
    }
