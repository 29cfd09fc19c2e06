"""What every detector shares: labels, calibration, p-values, saving and loading.

A detector stores; the equations are in `functional`. Higher score = more in-distribution, everywhere.
"""

from __future__ import annotations

import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ood_core import labels as by_name
from ood_core.backbones import create_backbone
from ood_core.backbones.base import FEATURES, Backbone
from ood_core.backbones.specs import located, lost_paths, relative_to
from ood_core.calibration import Calibration, benjamini_hochberg, check_tpr, features_hash, scores_hash
from ood_core.data import open_source
from ood_core.data.sources import ImageSource
from ood_core.detectors import detector_class
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError, unknown_name
from ood_core.features import FeatureSet, content_keys, stream
from ood_core.files import check_schema, json_writer, write_together
from ood_core.prompts import text_features

__all__ = ["Detector", "Scorable", "match_labels"]

log = logging.getLogger(__name__)

Scorable = Any
"""Scores (tensor, array or list of numbers), a `FeatureSet`, or images (source, folder, PIL images)."""


class Observed(NamedTuple):
    """What a detector made of data: scores [N], the classes it predicted (None if not asked or none), their hash."""

    scores: Tensor
    classes: Tensor | None
    data_hash: str


class Detector(ABC):
    """Base of all detectors.

    Subclasses name what they `need` from a backbone, take their options as keyword arguments of `__init__` (stored
    under the same names) and implement `_score`; those that learn something implement `_fit` and keep tensors in
    `self.state`, which is saved with them.

    Attributes:
        name: the name in the registry.
        capabilities: what it needs of a backbone in any configuration.
        fit_options: options that `fit` depends on.
        demo_options: options for the demo's few classes, where the defaults would take long.
        fits_on_images: `fit` takes images instead of features (methods that change the backbone).
        class_names: the known classes, in the order of logits; empty until known.
        state: named tensors, saved as safetensors.
        threshold: scores below it are OOD; None before `calibrate`.
        members: the detectors that this one is made of, by name; empty for all but fusions.
        least_classes: fewer known classes say nothing: two for a softmax, which is 1 over a single class.

    Example:
        >>> detector = create_detector("knn", backbone="tiny").fit(train).calibrate(val)  # doctest: +SKIP
        >>> detector.is_ood(test)  # doctest: +SKIP
    """

    name: ClassVar[str]
    capabilities: ClassVar[frozenset[str]] = frozenset({"image"})
    fit_options: ClassVar[frozenset[str]] = frozenset()
    default_template: ClassVar[str] = "a photo of a {}"
    remedy: ClassVar[str] = "call fit(features) with ID images first"
    chunk: ClassVar[int] = 512
    demo_options: ClassVar[Mapping[str, Any]] = {}
    fits_on_images: ClassVar[bool] = False
    least_classes: ClassVar[int] = 0
    members: Mapping[str, Detector] = MappingProxyType({})

    def __init__(
        self,
        *,
        class_names: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
    ) -> None:
        self._backbone: Backbone | None = None
        self._backbone_record: dict[str, str] = {}
        self.class_names = by_name.check_class_names(class_names)
        self._check_class_count(len(self.class_names))
        self._given_names = list(self.class_names)
        self.template = template
        self.state: dict[str, Tensor] = {}
        self.threshold: float | None = None
        self.tpr: float | None = None
        self._calibration: Calibration | None = None
        self._fitted_on: Tensor | None = None  # content keys of the images
        self._told: set[str] = set()

    # ---- what a subclass provides

    @property
    def needs(self) -> frozenset[str]:
        """Features it reads, of "image", "local", "logits", "local_logits"."""
        return frozenset({"image"})

    @property
    def fitted(self) -> bool:
        """Whether it can score."""
        return bool(self.state)

    @abstractmethod
    def _score(self, features: FeatureSet) -> Tensor:
        """Scores [N] of a chunk of features."""

    def _predict(self, features: FeatureSet) -> Tensor | None:
        """Class numbers [N] of a chunk of features, for methods that also classify."""
        return None

    def _fit(self, features: FeatureSet) -> None:  # noqa: B027
        """Learn from features; nothing to do for training-free detectors."""

    def _attach(self, backbone: Backbone) -> None:
        """Check capabilities and take what is needed from a new backbone."""
        backbone.require(*sorted(self.asks_of(backbone)))

    def asks_of(self, backbone: Backbone) -> frozenset[str]:
        """What it needs of this backbone."""
        return self.capabilities | self.needs

    def _class_texts(self, backbone: Backbone) -> Tensor:
        """Features [C, d] of the class names in this detector's template, on the CPU."""
        if not self.class_names:
            raise UsageError(
                f"{self.name!r} compares images with class names: pass class_names= (--classes FILE, or --fit SOURCE "
                "with a folder per known class)."
            )
        self.template = self.template or self.default_template
        return text_features(backbone, self.class_names, self.template).cpu()

    def _check_class_count(self, count: int) -> None:
        """Refuse a single class where a softmax over the classes is the score: it is 1 for every image."""
        if 0 < count < self.least_classes:
            raise UsageError(
                f"{self.name!r} needs at least two classes, got {self.class_names or count}: a softmax over one is "
                "always 1. For a single class take 'knn' or 'mahalanobis' on its images, or its cosine alone: "
                "'max_logit' with this class name."
            )

    # ---- backbone

    @property
    def backbone(self) -> Backbone | None:
        """The backbone, loaded when first asked for; None if the detector was made without one."""
        if self._backbone is None and self._backbone_record:
            self.attach(create_backbone(self._recorded_spec(), dtype=self.precision))
        return self._backbone

    def _recorded_spec(self) -> str:
        """The spec of the backbone it was made with.

        Raises:
            MissingDataError: files or folders in it that are not there any more.
        """
        spec = self._backbone_record.get("spec", "tiny")
        if lost := lost_paths(spec):
            raise MissingDataError(
                f"Detector {self.name!r} was made with backbone {spec!r}, and there is nothing at {lost[0]}: put it "
                "back, or pass backbone= (--backbone) with the place where it is now."
            )
        return spec

    def attach(self, backbone: Backbone | str) -> None:
        """Take a backbone, or load the one of this spec.

        Raises:
            UsageError: one without the capabilities that are needed, or another than the detector was fitted with.
        """
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, dtype=self.precision)
        expected = self._backbone_record.get("fingerprint")
        if expected and expected != backbone.fingerprint:
            raise UsageError(
                f"Detector {self.name!r} was made with backbone {self._backbone_record['spec']!r} "
                f"({expected[:12]}), not with {backbone.spec!r} ({backbone.fingerprint[:12]}). Fit it again."
            )
        now = backbone.precision
        self._tell_precision(now, f"{backbone.spec!r} computes")
        dtype = self._backbone_record.get("dtype") or now
        self._attach(backbone)
        self._check_class_count(len(self.class_names))
        self._backbone = backbone
        self._backbone_record = backbone.record() | {"dtype": dtype}

    @property
    def precision(self) -> str:
        """What it was fitted in, e.g. "bfloat16", and its backbone is therefore loaded in; "auto" if unknown."""
        return self._backbone_record.get("dtype") or "auto"

    def _tell_precision(self, now: str, who: str) -> None:
        """Say once that scores are compared across precisions."""
        fitted = self._backbone_record.get("dtype")
        if fitted and now and now != fitted and now not in self._told:
            self._told.add(now)
            log.warning(
                "%s was made in %s and %s in %s: %s Use dtype=%r (--dtype %s), or fit and calibrate again.",
                self.name,
                fitted,
                who,
                now,
                _PRECISION_MOVES,
                fitted,
                fitted,
            )

    def _check_features(self, features: FeatureSet) -> None:
        if not isinstance(features, FeatureSet):
            raise TypeError(f"{self.name!r} takes a FeatureSet (see `extract`), got {type(features).__name__}.")
        if not len(features):
            raise DataError(f"{self.name!r} got an empty FeatureSet.")
        absent = [need for need in sorted(self.needs) if features.get(need) is None]
        if absent:
            raise UsageError(
                f"{self.name!r} needs {' and '.join(map(repr, sorted(self.needs)))} features; these have no "
                f"{absent[0]!r}. Extract with needs={sorted(self.needs)}."
            )
        expected = self._backbone_record.get("fingerprint")
        if expected and features.fingerprint and expected != features.fingerprint:
            raise UsageError(
                f"These features are of backbone {features.backbone!r} ({features.fingerprint[:12]}), the detector "
                f"is of {self._backbone_record['spec']!r} ({expected[:12]}). Extract them again."
            )
        self._tell_precision(features.dtype, "these features are")
        for need in sorted(self.needs & set(FEATURES)):
            check_finite(self.name, need, features)

    # ---- fitting and scoring

    def fit(self, features: FeatureSet) -> Self:
        """Learn from ID features; forgets an earlier calibration.

        Args:
            features: of the ID training images, with labels where the method needs them.

        Returns:
            self.

        Raises:
            UsageError: features that lack what the method needs, or of another backbone; too few classes.
            DataError: labels that are missing or unknown, or features that are NaN or infinite.
        """
        self._check_features(features)
        before = dict(self.state)
        self._fit(self._in_single_precision(features))
        if features.fingerprint and not self._backbone_record:
            self._backbone_record = {"spec": features.backbone, "fingerprint": features.fingerprint}
        if any(value is not before.get(name) for name, value in self.state.items()):  # else it has learned nothing
            self._remember(features)
        self._forget_calibration()
        return self

    def _remember(self, images: FeatureSet | ImageSource) -> None:
        """Which images a fit has seen, and in which precision."""
        self._fitted_on = content_keys(images).unique()
        dtype = images.dtype if isinstance(images, FeatureSet) else ""
        if not dtype and self._backbone is not None:
            dtype = self._backbone.precision
        if dtype and self._backbone_record:
            self._backbone_record["dtype"] = dtype

    @torch.no_grad()
    def score_features(self, features: FeatureSet) -> Tensor:
        """Scores, float32 [N], higher = more in-distribution; an image's score never depends on the others.

        Raises:
            NotFittedError: before `fit`, for methods that need it.
            UsageError: features that lack what the method needs, or of another backbone.
            DataError: features that are NaN or infinite.
        """
        self._check_scorable(features)
        return torch.cat([self._score(part) for part in self._parts(features)]).float().cpu()

    @torch.no_grad()
    def predict(self, features: FeatureSet) -> Tensor | None:
        """The most likely known class of every image, int64 [N], an index into `class_names`.

        Returns:
            None for methods that do not classify.

        Raises:
            NotFittedError: before `fit`, for methods that need it.
            UsageError: features that lack what the method needs, or of another backbone.
            DataError: features that are NaN or infinite.
        """
        self._check_scorable(features)
        parts = [self._predict(part) for part in self._parts(features)]
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None]).cpu()

    def _parts(self, features: FeatureSet) -> Iterator[FeatureSet]:
        starts = range(0, len(features), self.chunk)
        return (self._in_single_precision(features[start : start + self.chunk]) for start in starts)

    def _in_single_precision(self, features: FeatureSet) -> FeatureSet:
        """What weights and banks are kept in; features may have been stored in any other."""
        columns = features._columns()
        return features._with_columns(columns | {need: columns[need].float() for need in self.needs})

    def correct(self, features: FeatureSet) -> Tensor | None:
        """Which predictions are right, bool [M], of the images whose label is one of `class_names`.

        Returns:
            None for methods that do not classify, and for images without such labels.
        """
        return None if features.labels is None else self._hits(features, self.predict(features))

    def _hits(self, features: FeatureSet, predicted: Tensor | None) -> Tensor | None:
        if predicted is None or features.labels is None:
            return None
        labels = match_labels(features.label_names, self.class_names)[features.labels]
        return (predicted == labels)[labels >= 0] if bool((labels >= 0).any()) else None

    def _check_scorable(self, features: FeatureSet) -> None:
        self._check_features(features)
        if not self.fitted:
            raise NotFittedError(f"{self.name!r} has not been fitted: {self.remedy}.")
        # A classifier's head may be of one class, too, and a detector saved by an earlier version.
        self._check_class_count(features.logits.shape[1] if "logits" in self.needs else len(self.class_names))

    def score(self, images: Any, **options: Any) -> Tensor:
        """Scores of images, float32 [N].

        Args:
            images: an image source, folder, manifest, parquet file, a PIL image or a list of them. With
                `on_error="record"` images that cannot be decoded have no entry; `ood_core.evaluation.score` gives a
                table that names them.
            **options: for `stream` (`batch_size`, `workers`, `cache`, `max_pixels`, `value_range`, ...).

        In float32 an image's score depends on no other image but for rounding (1e-5 of it). In half precision the
        network itself rounds differently with the batch size: for decisions on single images take a backbone with
        `dtype="float32"`.

        Raises:
            TypeError: something else than images.
            UsageError: the detector has no backbone.
            ImageError: an image that cannot be decoded.
        """
        if not holds_images(images) and not isinstance(images, list | tuple):
            raise TypeError(f"score takes {_IMAGES}; got {_kind_of(images)}.")
        images = [images] if isinstance(images, Image.Image) else images
        parts = stream(self.require_backbone(), images, needs=self.needs, **options)
        scores = torch.cat([self.score_features(part) for part in parts if len(part)])
        self._tell_batch(len(scores))
        return scores

    def _tell_batch(self, images: int) -> None:
        """Say once that a lone image's score and a threshold from batches differ in half precision."""
        dtype = self.require_backbone().precision
        halved = self.threshold is not None and dtype in ("bfloat16", "float16")
        if images == 1 and halved and "batch" not in self._told:
            self._told.add("batch")
            log.warning(
                "%s decides on a single image in %s, in which scores move with the batch size, %s Make the backbone "
                "with dtype='float32' (--dtype float32) for decisions on single images, and calibrate with it.",
                self.name,
                dtype,
                _BATCH_MOVES,
            )

    def require_backbone(self) -> Backbone:
        """The backbone.

        Raises:
            UsageError: the detector was made without one.
        """
        if self.backbone is None:
            raise UsageError(f"{self.name!r} has no backbone to read images with: pass backbone= when creating it.")
        return self.backbone

    def _observe(self, data: Scorable, *, classify: bool = False) -> Observed:
        """Scores of whatever was given: scores themselves, features or images; and classes, if asked for."""
        if isinstance(data, Observed):
            return data
        if isinstance(data, FeatureSet):
            parts: Any = [data]
        elif holds_images(data):
            images = [data] if isinstance(data, Image.Image) else data
            parts = (part for part in stream(self.require_backbone(), images, needs=self.needs) if len(part))
        else:
            scores = _score_vector(data)
            return Observed(scores, None, scores_hash(scores))
        scored, predicted, ids, source = [], [], [], ""
        for part in parts:
            scored.append(self.score_features(part))
            predicted.append(self.predict(part) if classify else None)
            ids += part.ids
            source = part.source
        known = [classes for classes in predicted if classes is not None]
        scores = _without_nan(torch.cat(scored), self.name)
        if not isinstance(data, FeatureSet):
            self._tell_batch(len(scores))
        return Observed(scores, torch.cat(known) if known else None, features_hash(source, ids))

    def explain_image(self, image: Image.Image) -> Image.Image | None:
        """A picture of why an image got its score, as reports show it.

        Args:
            image: of any size and mode.

        Returns:
            None for methods that have no such picture.
        """
        return None

    # ---- made of other detectors

    def _leaves(self, path: str) -> dict[str, Detector]:
        """The detectors that see images, by path: itself, or the members' members."""
        return {path: self}

    def _assemble(self, path: str, scores: Mapping[str, Tensor]) -> Tensor:
        """Its scores from those of its leaves."""
        return scores[path]

    # ---- decisions

    @property
    def calibration(self) -> Calibration | None:
        """Threshold, TPR with its interval, number and hash of the calibration images; None before `calibrate`."""
        return self._calibration

    def calibrate(self, id_scores: Scorable, tpr: float = 0.95, *, allow_overlap: bool = False) -> Self:
        """Set the threshold that keeps a share `tpr` of ID images.

        The true TPR of that threshold is uncertain; `self.calibration.tpr_interval()` is exact for it (the Beta
        distribution of an order statistic, see `ood_core.calibration.tpr_interval`).

        Args:
            id_scores: scores, features or images of at least 20 ID images that were not used for fitting.
            tpr: share of ID images to accept, in (0, 1].
            allow_overlap: take images that the detector was fitted on, too. Their scores are higher than those of new
                images, most of which the threshold may then refuse.

        Returns:
            self, with `threshold` = the highest value that accepts at least `tpr` of them, and `calibration`.

        Raises:
            ValueError: `tpr` out of range, or NaN.
            DataError: fewer than 20 scores, infinite ones or all the same; images that the detector was fitted on.
        """
        check_tpr(tpr)
        self._check_class_count(len(self.class_names))
        if not allow_overlap:
            self._check_held_out(id_scores)
        scores, classes, data_hash = self._observe(id_scores, classify=True)
        return self._keep(Calibration.of(scores, tpr, classes=classes, data_hash=data_hash))

    def _check_held_out(self, data: Any) -> None:
        """Refuse to calibrate on images that it, or a member, was fitted on."""
        seen = {leaf.name: leaf._fitted_on for leaf in self._leaves(self.name).values() if leaf._fitted_on is not None}
        keys = _keys_of(data) if seen else None
        for name, fitted_on in seen.items():
            if keys is not None and (count := int(torch.isin(keys, fitted_on).sum())):
                raise DataError(
                    f"{count} of the {len(keys)} calibration images are among those that {name!r} was fitted on, whose "
                    "scores are higher than those of new images: the threshold would refuse far more ID images than "
                    "asked. Give held-out images, or allow_overlap=True (--allow-overlap)."
                )

    def _keep(self, calibration: Calibration) -> Self:
        self._calibration, self.threshold, self.tpr = calibration, calibration.threshold, calibration.tpr
        return self

    def _forget_calibration(self) -> None:
        self.threshold, self.tpr, self._calibration = None, None, None

    def is_ood(self, data: Scorable, *, fdr: float | None = None, by_class: bool = False) -> Tensor:
        """Decisions, bool [N]: True where the score is below the threshold.

        Args:
            data: scores, features or images.
            fdr: decide on the batch as a whole instead (Benjamini-Hochberg): on average at most this share of the
                images named OOD is ID. An image's decision then depends on the others.
            by_class: decide by `p_value(by_class=True)`: OOD at 1 - `tpr` or less, or by `fdr`.

        Raises:
            NotFittedError: before `calibrate`.
            UsageError: `by_class` of a detector that does not classify, or on scores; `fdr` outside (0, 1).
            DataError: too few calibration images for `fdr`, or for `by_class`.
        """
        if fdr is None and not by_class:
            return self._observe(data).scores < self._calibrated(self.threshold)
        if fdr is None:
            return self._p_values(data, by_class) <= 1 - self._calibrated(self.tpr) + 1e-9
        self._calibrated(self._calibration).check_reaches(fdr)
        return benjamini_hochberg(self._p_values(data, by_class), fdr)

    def p_value(self, data: Scorable, *, by_class: bool = False) -> Tensor:
        """Conformal p-values [N] in (0, 1]: (1 + calibration scores at or below the score) / (n + 1).

        Of ID images exchangeable with the calibration images at most a share `a` has a p-value of `a` or less.

        Args:
            data: scores, features or images.
            by_class: against the calibration images of the same predicted class, so that this holds among the images
                predicted as each class. Classes with fewer than 20 calibration images are taken together.

        Raises:
            NotFittedError: before `calibrate`.
            UsageError: `by_class` of a detector that does not classify, or on scores.
            DataError: `by_class`, and no class has 20 calibration images.
        """
        return self._p_values(data, by_class).float()

    def _p_values(self, data: Scorable, by_class: bool) -> Tensor:
        known = self._calibrated(self._calibration)
        observed = self._observe(data, classify=by_class)
        if by_class and observed.classes is None:
            raise UsageError(
                f"{self.name!r} has no predicted class for these data: p-values by class need features or images, and "
                "a detector that classifies."
            )
        return known.p_values(observed.scores, observed.classes if by_class else None)

    def _calibrated(self, value: Any) -> Any:
        if value is None:
            raise NotFittedError(f"{self.name!r} has not been calibrated: call calibrate(id_features) first.")
        return value

    # ---- labels

    def _class_labels(self, features: FeatureSet) -> Tensor:
        """Labels as indices into `class_names`, matched by name; takes the names over if none were given."""
        if features.labels is None:
            raise DataError(f"{self.name!r} needs labelled images to fit; these have no labels.")
        # Those of an earlier fit do not count: it may have left classes out.
        self.class_names = self._given_names or by_name.check_class_names(features.label_names, what="Labels")
        self.class_names = list(self.class_names)
        self._check_class_count(len(self.class_names))
        table = match_labels(features.label_names, self.class_names)
        used = sorted(set(features.labels.tolist()) - {-1})
        if unknown := [features.label_names[i] for i in used if table[i] < 0]:
            raise DataError(
                f"Labels {unknown[:5]} are not among the detector's {len(self.class_names)} class names "
                f"({self.class_names[:5]} ...). Give class_names that match the labels."
            )
        if (features.labels < 0).any():
            raise DataError(f"{int((features.labels < 0).sum())} of the images to fit on have no label.")
        return table[features.labels]

    # ---- parameters

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the method's options: the parameters of `__init__` that are its own."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in _COMMON]

    def get_params(self) -> dict[str, Any]:
        """The method's options by name."""
        return {name: getattr(self, name) for name in self.option_names()}

    def set_params(self, **params: Any) -> Self:
        """Change options; the calibration is dropped, and the fitted state if it depended on them.

        Raises:
            UsageError: an unknown option.
        """
        current = self.get_params()
        for name in params:
            if name not in current:
                raise unknown_name(f"option of {self.name!r}", name, current)
        made = self._with_params({**current, **params})
        for name in params:
            setattr(self, name, getattr(made, name))
        if self.fit_options & set(params):
            self.state, self._fitted_on = {}, None
            if self._backbone is not None:
                self._attach(self._backbone)
        self._forget_calibration()
        return self

    def _with_params(self, params: dict[str, Any]) -> Self:
        """A new detector of these options, which checks them."""
        return type(self)(**params)

    @property
    def stamps(self) -> dict[str, Any]:
        """What results must say of this detector beside its options."""
        return {}

    # ---- storage

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (atomic, no pickle)."""
        folder = Path(folder)
        tensors = {f"state.{name}": value.contiguous() for name, value in self.state.items()}
        if self._fitted_on is not None:
            tensors["fitted_on"] = self._fitted_on
        if self._calibration is not None:
            tensors["calibration"] = self._calibration.scores
            if self._calibration.classes is not None:
                tensors["calibration.classes"] = self._calibration.classes
        config = self._config()
        config |= {"backbone": _portable(config["backbone"], folder)}
        own = {"model.safetensors": lambda path: save_file(tensors, path), "config.json": json_writer(config)}
        write_together(folder, self._files() | own)

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        """What else is saved beside `config.json` and `model.safetensors`: how to write a file, by its name."""
        return {}

    def _config(self) -> dict[str, Any]:
        """Everything saved that is no tensor."""
        return {
            "schema": 1,
            "detector": self.name,
            "params": self.get_params(),
            "class_names": self.class_names,
            "template": self.template,
            "backbone": self._backbone_record,
            "threshold": self.threshold,
            "tpr": self.tpr,
            "calibration": None if self._calibration is None else self._calibration.describe(),
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, backbone: Backbone | str | None = None) -> Self:
        """Load a saved detector of any kind.

        Args:
            folder: what `save_pretrained` wrote, or the name of such a repository on the Hugging Face hub.
            backbone: one that is loaded already; otherwise the recorded one is loaded when images are scored, in the
                precision that the detector was fitted in.

        Raises:
            MissingDataError: no such folder or repository.
            DataError: files that are not a saved detector.
            UsageError: a backbone with another fingerprint, or a detector of another class.
        """
        path = _local_folder(folder)
        config, tensors = _read_saved(path)
        kind = detector_class(config["detector"])
        if not issubclass(kind, cls):
            raise UsageError(f"{path} holds a {config['detector']!r} detector, not a {cls.__name__}.")
        try:
            made = kind._empty(path, config)
        except TypeError as error:
            raise DataError(f"{path} was saved by another version of {config['detector']!r}: {error}.") from error
        # Copies lie in memory as fitted tensors do: the last bits of products depend on the place.
        made.state = {k.removeprefix("state."): v.clone() for k, v in tensors.items() if k.startswith("state.")}
        if "calibration" in tensors:
            made._keep(_read_calibration(config, tensors))
        made._fitted_on = tensors.get("fitted_on")
        made._backbone_record = _found(config["backbone"], path)
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, dtype=made.precision)
        if backbone is not None:
            made.attach(backbone)
        return made

    @classmethod
    def _empty(cls, path: Path, config: dict[str, Any]) -> Self:
        """A detector of the recorded options, before its tensors are put in."""
        made = cls(template=config["template"], **config["params"])
        # As recorded: what an earlier version took must still load.
        made.class_names = list(config["class_names"])
        made._given_names = list(made.class_names)
        return made

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.get_params().items())
        return f"{type(self).__name__}({options})"


def _portable(record: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What is saved of a backbone: where its files lie seen from the detector, too, as both may move together."""
    spec = record.get("spec", "")
    relative = relative_to(spec, folder)
    return {**record} | ({} if relative == spec else {"relative": relative})


def _found(record: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What was saved of a backbone, its files looked for where they were and then beside the detector."""
    kept = {key: value for key, value in record.items() if key != "relative"}
    moved = located(record.get("relative", ""), folder)
    if moved and lost_paths(kept["spec"]) and not lost_paths(moved):
        kept["spec"] = moved
    return kept


# Largest shifts measured on photographs, in standard deviations of the ID scores: with the embedded backbone, and with
# larger ones.
_BATCH_MOVES = "by up to 0.03 to 0.28 standard deviations of the ID scores."
_PRECISION_MOVES = "scores move by up to 0.08 to 0.33 standard deviations of the ID scores, and some decisions change."


def _keys_of(data: Any) -> Tensor | None:
    """Content keys of features or images; None of scores, of which nobody knows whose they are."""
    if isinstance(data, list | tuple) and data and isinstance(data[0], FeatureSet):
        return _keys_of(data[0])  # of several backbones, but the same images
    if isinstance(data, FeatureSet):
        return content_keys(data)
    return content_keys(open_source([data] if isinstance(data, Image.Image) else data)) if holds_images(data) else None


# Parameters of every detector's __init__ that are no options of its method.
_COMMON = ("self", "class_names", "template", "common")


def match_labels(label_names: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """Index into `class_names` of every label name, -1 where it is not among them; and a last -1 for no label.

    Args:
        label_names: L names.
        class_names: C names; `ood_core.labels.plain_name` says when two are the same.

    Returns:
        int64 [L + 1], to be indexed by labels, -1 included.

    Example:
        >>> match_labels(["great_dane", "cat"], ["cat", "great dane"])
        tensor([ 1,  0, -1])
    """
    return torch.from_numpy(np.append(by_name.match_labels(label_names, class_names)[0], -1))


def holds_images(data: Any) -> bool:
    """Whether data are images, rather than features or scores."""
    if isinstance(data, ImageSource | str | Path | Image.Image):
        return True
    return isinstance(data, list | tuple) and bool(data) and isinstance(data[0], Image.Image)


def check_finite(name: str, need: str, features: FeatureSet) -> None:
    """Refuse features that are no numbers: scores would be none either, or wrong ones.

    Args:
        name: of the detector.
        need: the feature to look at.
        features: at least one image.

    Raises:
        DataError: NaN or infinite values.
    """
    values = features.get(need)
    if values.sum().isfinite():  # unlike a mask, takes no memory
        return
    broken = (~values.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:  # else only the sum is too large for its precision
        raise DataError(
            f"{name!r} cannot read these features: {need!r} holds NaN or infinite values for {len(broken)} of "
            f"{len(values)} images, the first {features.ids[broken[0]]!r}. Extract them again, or leave these images "
            "out."
        )


def _without_nan(scores: Tensor, name: str) -> Tensor:
    """NaN is below no threshold: without this check such an image would pass as ID."""
    if scores.isnan().any():
        raise DataError(f"{name!r} gave no number (NaN) for {int(scores.isnan().sum())} of {len(scores)} images.")
    return scores


def as_float32(scores: Any) -> Tensor:
    """A tensor, array or list as a float32 tensor on the CPU."""
    return (
        (scores if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores, dtype=np.float32))).float().cpu()
    )


_IMAGES = "images: an image source, a folder, manifest or parquet file, a PIL image or a list of them"


def _kind_of(data: Any) -> str:
    """What was given instead, and what becomes an image or a score of it."""
    kind, shape = type(data).__name__, getattr(data, "shape", None)
    if isinstance(data, FeatureSet):
        return f"a {kind}, which score_features takes"
    if shape is not None:
        return f"a {kind} of shape {list(shape)}; pixels become images with PIL.Image.fromarray"
    if isinstance(data, list | tuple) and data:
        return f"a {kind} of {type(data[0]).__name__}; pixels become images with PIL.Image.fromarray"
    return repr(data) if data is None or isinstance(data, int | float) else f"a {kind}"


def _score_vector(data: Any) -> Tensor:
    takes = f"Give scores (a vector of numbers), a FeatureSet, or {_IMAGES}"
    if data is None or isinstance(data, Mapping | bytes):
        raise TypeError(f"{takes}; got {_kind_of(data)}.")
    try:
        scores = as_float32(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{takes}; got {_kind_of(data)}.") from error
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"Scores must be a non-empty vector, got shape {list(scores.shape)}. {takes}; got {_kind_of(data)}."
        )
    if scores.isnan().any():
        raise ValueError(f"Scores hold NaN ({int(scores.isnan().sum())} of {len(scores)}).")
    return scores


def _local_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        # Some detectors hold others, or an edit, in folders of their own.
        wanted = ["config.json", "model.safetensors", "*/config.json", "*/model.safetensors", "*/edit.*"]
        return Path(snapshot_download(str(folder), allow_patterns=wanted))
    except Exception as error:
        raise MissingDataError(
            f"{folder} is no folder with a saved detector, and no repository of that name could be fetched "
            f"({type(error).__name__})."
        ) from error


def _read_saved(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise MissingDataError(f"{path} holds no saved detector: {name} is missing.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "model.safetensors")
    except Exception as error:
        raise DataError(f"{path} holds no readable detector ({type(error).__name__}: {error}).") from error
    wanted = {"schema", "detector", "params", "class_names", "template", "backbone", "threshold", "tpr"}
    if missing := wanted - (set(config) if isinstance(config, dict) else set()):
        raise DataError(f"{path / 'config.json'} is not of a saved detector: it lacks {sorted(missing)}.")
    check_schema(config, path / "config.json", "ood-core")
    return config, tensors


def _read_calibration(config: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    """Detectors saved by earlier versions have neither classes nor hash."""
    record = config.get("calibration") or {}
    return Calibration(
        scores=tensors["calibration"],
        threshold=config["threshold"],
        tpr=config["tpr"],
        classes=tensors.get("calibration.classes"),
        data_hash=record.get("data_hash", ""),
    )
