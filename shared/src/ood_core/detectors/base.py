"""What every detector shares. Its equations are in `functional`: a detector stores, and calls them.

Higher score = more in-distribution, everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from ood_core import labels as by_name
from ood_core.backbones import create_backbone
from ood_core.backbones.base import FEATURES, Backbone
from ood_core.calibration import Calibration, check_tpr, features_hash, scores_hash
from ood_core.data.sources import Images, ImageSource
from ood_core.detectors import storage
from ood_core.detectors.given import (
    Data,
    Observed,
    Scorable,
    check_finite,
    check_images,
    holds_images,
    keys_of,
    score_vector,
    without_nan,
)
from ood_core.detectors.held import Held
from ood_core.errors import DataError, NotFittedError, UsageError, unknown_name
from ood_core.features import FeatureSet, content_keys, extract, label_table, stream
from ood_core.options import expose, groups_of, method_options, owners
from ood_core.prompts import text_features

__all__ = ["Detector", "backbone_of", "leaves", "needs_of", "right_predictions"]


class Detector(ABC):
    """Base of all detectors.

    Subclasses name what they `need` from a backbone, take their options as keyword arguments of `__init__` (stored
    under the same names; many of them in groups, see `ood_core.options`) and implement `_score`; those that learn
    something implement `_fit` and keep tensors in `self.state`, which is saved with them. What they hold of a backbone
    is in `held`, what they know of ID images in `ood_core.calibration`, how they lie on a disk in `storage`.

    Attributes:
        name: the name in the registry.
        capabilities: what it needs of a backbone in any configuration.
        fit_options: options that `fit` depends on.
        demo_options: options for the demo's few classes, where the defaults would take long.
        changes_backbone: it learns from images only, as its backbone is another one afterwards.
        class_names: the known classes, in the order of logits; empty until known.
        state: named tensors, saved as safetensors.
        calibration: threshold, TPR with its interval, number and hash of the calibration images; None before
            `calibrate`.
        fitted_on: content keys of the images that it was fitted on.
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
    blind: ClassVar[str] = "{name!r} has no backbone to read images with: pass backbone= when creating it."
    chunk: ClassVar[int] = 512
    demo_options: ClassVar[Mapping[str, Any]] = {}
    changes_backbone: ClassVar[bool] = False
    least_classes: ClassVar[int] = 0
    members: Mapping[str, Detector] = MappingProxyType({})

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        expose(cls)

    def __init__(
        self,
        *,
        class_names: Sequence[str] | None = None,
        template: str | Sequence[str] | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise unknown_name(f"option of {self.name!r}", name, method_options(type(self)) or ["none"])
        self._held = Held(self.name)
        self.class_names = by_name.check_class_names(class_names)
        self._check_class_count(len(self.class_names))
        self._given_names = list(self.class_names)
        self.template = template
        self.state: dict[str, Tensor] = {}
        self.calibration: Calibration | None = None
        self.fitted_on: Tensor | None = None

    # ---- what a subclass provides

    @property
    def needs(self) -> frozenset[str]:
        """Features it reads, of "image", "local", "logits", "local_logits"."""
        return frozenset({"image"})

    @property
    def fitted(self) -> bool:
        """Whether it can score."""
        return bool(self.state)

    @property
    def stamps(self) -> dict[str, Any]:
        """What results must say of this detector beside its options."""
        return {}

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
        backbone.require(*sorted(self._asks(backbone)))

    def _asks(self, backbone: Backbone) -> frozenset[str]:
        """What it needs of this backbone."""
        return self.capabilities | self.needs

    def explain_image(self, image: Image.Image) -> Image.Image | None:
        """A picture of why an image got its score, as reports show it.

        Args:
            image: of any size and mode.

        Returns:
            None for methods that have no such picture.
        """
        return None

    # ---- classes

    def _class_texts(self, backbone: Backbone) -> Tensor:
        """Features [C, d] of the class names in this detector's template, on the CPU."""
        if not self.class_names:
            raise UsageError(
                f"{self.name!r} compares images with class names: pass class_names= (--classes FILE, or --fit SOURCE "
                "with a folder per known class)."
            )
        self.template = self.template or self.default_template
        return text_features(backbone, self.class_names, self.template).cpu()

    def _class_labels(self, features: FeatureSet) -> Tensor:
        """Labels as indices into `class_names`, matched by name; takes the names over if none were given."""
        if features.labels is None:
            raise DataError(f"{self.name!r} needs labelled images to fit; these have no labels.")
        # Those of an earlier fit do not count: it may have left classes out.
        self.class_names = list(self._given_names or by_name.check_class_names(features.label_names, what="Labels"))
        self._check_class_count(len(self.class_names))
        table = label_table(features.label_names, self.class_names)
        used = sorted(set(features.labels.tolist()) - {-1})
        if unknown := [features.label_names[i] for i in used if table[i] < 0]:
            raise DataError(
                f"Labels {unknown[:5]} are not among the detector's {len(self.class_names)} class names "
                f"({self.class_names[:5]} ...). Give class_names that match the labels."
            )
        if (features.labels < 0).any():
            raise DataError(f"{int((features.labels < 0).sum())} of the images to fit on have no label.")
        return table[features.labels]

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
        if self._held.backbone is None and self._held.record:
            self.attach(self._held.load())
        return self._held.backbone

    @property
    def precision(self) -> str:
        """What it was fitted in, e.g. "bfloat16", and its backbone is therefore loaded in; "auto" if unknown."""
        return self._held.precision

    def attach(self, backbone: Backbone | str) -> None:
        """Take a backbone, or load the one of this spec.

        Raises:
            UsageError: one without the capabilities that are needed, or another than the detector was fitted with.
        """
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, dtype=self.precision)
        self._held.check_backbone(backbone)
        self._attach(backbone)
        self._check_class_count(len(self.class_names))
        self._held = self._held.taking(backbone)

    # ---- fitting

    def fit(self, data: Data, **options: Any) -> Self:
        """Learn from ID images, or from features of them; forgets an earlier calibration.

        Args:
            data: a `FeatureSet`, for `fit_features`; or images, for `fit_images`. With labels where the method needs
                them. A `Fusion` also takes features of several backbones.
            **options: of that function.

        Returns:
            self.

        Raises:
            TypeError: something else.
            UsageError, DataError: see there.
        """
        if isinstance(data, FeatureSet):
            return self.fit_features(data, **options)
        if not holds_images(data):
            raise TypeError(f"{self.name!r} takes a FeatureSet (see `extract`) or images, got {type(data).__name__}.")
        return self.fit_images(data, **options)  # type: ignore[arg-type]  # so it holds images

    def fit_features(self, features: FeatureSet) -> Self:
        """Learn from features of ID images; forgets an earlier calibration.

        Args:
            features: of the ID training images, with labels where the method needs them.

        Returns:
            self.

        Raises:
            UsageError: features that lack what the method needs, or of another backbone; too few classes; a method
                that changes the backbone, and therefore learns from images.
            DataError: labels that are missing or unknown, or features that are NaN or infinite.
        """
        if self.changes_backbone:
            raise UsageError(
                f"{self.name!r} changes the backbone: fit it on images, not on features (a source or a folder)."
            )
        self._check_features(features)
        before = dict(self.state)
        self._fit(self._in_single_precision(features))
        if features.fingerprint and not self._held.record:
            self._held = self._held.recording(spec=features.backbone, fingerprint=features.fingerprint)
        if any(value is not before.get(name) for name, value in self.state.items()):  # else it has learned nothing
            self._remember(features)
        self.calibration = None
        return self

    def fit_images(
        self,
        images: Images,
        *,
        cache: str | Path | None = None,
        workers: int = 0,
        progress: bool | None = None,
    ) -> Self:
        """Learn from ID images; forgets an earlier calibration.

        Args:
            images: a source, a folder, ..., with labels where the method needs them.
            cache: folder for their features.
            workers: processes that decode images, which changes nothing else; 0 decodes in this one.
            progress: a bar on stderr; None shows it on a terminal only.

        Returns:
            self.

        Raises:
            UsageError: no backbone, or what `fit_features` raises.
            DataError: images that cannot be decoded, or what `fit_features` raises.
        """
        loading: dict[str, Any] = {"cache": cache, "workers": workers, "progress": progress}
        return self.fit_features(extract(backbone_of(self), images, self.needs, **loading))

    def _remember(self, images: FeatureSet | ImageSource) -> None:
        """Which images a fit has seen, and in which precision."""
        self.fitted_on = content_keys(images).unique()
        dtype = images.dtype if isinstance(images, FeatureSet) else ""
        if not dtype and self._held.backbone is not None:
            dtype = self._held.backbone.precision
        if dtype and self._held.record:
            self._held = self._held.recording(dtype=dtype)

    # ---- scores

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

    def score(self, images: Images, **options: Any) -> Tensor:
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
        check_images(images, "score")
        parts = stream(backbone_of(self), images, needs=self.needs, **options)
        scores = torch.cat([self.score_features(part) for part in parts if len(part)])
        self._tell_lone_image(scores)
        return scores

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

    def _tell_lone_image(self, scores: Tensor) -> None:
        if len(scores) == 1 and self.calibration is not None:
            self._held.tell_lone_image()

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
        self._held.check_features(features)
        for need in sorted(self.needs & set(FEATURES)):
            check_finite(self.name, need, features)

    def _check_scorable(self, features: FeatureSet) -> None:
        self._check_features(features)
        if not self.fitted:
            raise NotFittedError(f"{self.name!r} has not been fitted: {self.remedy}.")
        # A classifier's head may be of one class, too, and a detector saved by an earlier version.
        self._check_class_count(features.logits.shape[1] if "logits" in self.needs else len(self.class_names))

    # ---- decisions

    @property
    def threshold(self) -> float | None:
        """Scores below it are OOD; None before `calibrate`."""
        return None if self.calibration is None else self.calibration.threshold

    @property
    def tpr(self) -> float | None:
        """The share of ID images that `threshold` was set to accept; None before `calibrate`."""
        return None if self.calibration is None else self.calibration.tpr

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
        self.calibration = Calibration.of(scores, tpr, classes=classes, data_hash=data_hash)
        return self

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
        if fdr is not None:
            self._calibrated().check_reaches(fdr)
        observed = self._for_p_values(data, by_class)
        return self._calibrated().is_ood(*observed, fdr=fdr)

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
        return self._calibrated().p_values(*self._for_p_values(data, by_class)).float()

    def _for_p_values(self, data: Scorable, by_class: bool) -> tuple[Tensor, Tensor | None]:
        """Scores, and with `by_class` the predicted classes."""
        observed = self._observe(data, classify=by_class)
        if by_class and observed.classes is None:
            raise UsageError(
                f"{self.name!r} has no predicted class for these data: p-values by class need features or images, and "
                "a detector that classifies."
            )
        return observed.scores, observed.classes if by_class else None

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise NotFittedError(f"{self.name!r} has not been calibrated: call calibrate(id_features) first.")
        return self.calibration

    def _check_held_out(self, data: Any) -> None:
        """Refuse to calibrate on images that it, or a member, was fitted on."""
        seen = {leaf.name: leaf.fitted_on for leaf in leaves(self) if leaf.fitted_on is not None}
        keys = keys_of(data) if seen else None
        for name, fitted_on in seen.items():
            if keys is not None and (count := int(torch.isin(keys, fitted_on).sum())):
                raise DataError(
                    f"{count} of the {len(keys)} calibration images are among those that {name!r} was fitted on, "
                    "whose scores are higher than those of new images: the threshold would refuse far more ID images "
                    "than asked. Give held-out images, or allow_overlap=True (--allow-overlap)."
                )

    def _observe(self, data: Any, *, classify: bool = False) -> Observed:
        """Scores of whatever was given: scores themselves, features or images; and classes, if asked for."""
        if isinstance(data, Observed):
            return data
        if not isinstance(data, FeatureSet) and not holds_images(data):
            scores = score_vector(data)
            return Observed(scores, None, scores_hash(scores))
        if isinstance(data, FeatureSet):
            parts = [data]
        else:
            parts = [part for part in stream(backbone_of(self), data, needs=self.needs) if len(part)]
        scored, predicted, ids, source = [], [], [], ""
        for part in parts:
            scored.append(self.score_features(part))
            predicted.append(self.predict(part) if classify else None)
            ids += part.ids
            source = part.source
        known = [classes for classes in predicted if classes is not None]
        scores = without_nan(torch.cat(scored), self.name)
        if not isinstance(data, FeatureSet):
            self._tell_lone_image(scores)
        return Observed(scores, torch.cat(known) if known else None, features_hash(source, ids))

    # ---- made of other detectors

    def _assemble(self, of: Callable[[Detector], Tensor]) -> Tensor:
        """Its scores from those of its leaves."""
        return of(self)

    # ---- parameters

    def get_params(self) -> dict[str, Any]:
        """The method's options by name."""
        return {name: getattr(self, name) for name in method_options(type(self))}

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
        group = owners(groups_of(type(self).__init__))
        for name in {group.get(name, name) for name in params}:
            setattr(self, name, getattr(made, name))
        if self.fit_options & set(params):
            self.state, self.fitted_on = {}, None
            if self._held.backbone is not None:
                self._attach(self._held.backbone)
        self.calibration = None
        return self

    def _with_params(self, params: dict[str, Any]) -> Self:
        """A new detector of these options, which checks them."""
        return type(self)(**params)

    # ---- storage

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (atomic, no pickle)."""
        storage.save(self, Path(folder))

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
        return storage.load(cls, folder, backbone)

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        """What else is saved beside `config.json` and `model.safetensors`: how to write a file, by its name."""
        return {}

    def _config(self) -> dict[str, Any]:
        """Everything saved that is no tensor, but for the backbone."""
        return {
            "schema": 1,
            "detector": self.name,
            "params": self.get_params(),
            "class_names": self.class_names,
            "template": self.template,
            "threshold": self.threshold,
            "tpr": self.tpr,
            "calibration": None if self.calibration is None else self.calibration.describe(),
        }

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


def backbone_of(detector: Detector) -> Backbone:
    """The backbone of a detector.

    Raises:
        UsageError: it was made without one.
    """
    if detector.backbone is None:
        raise UsageError(detector.blind.format(name=detector.name))
    return detector.backbone


def needs_of(detector: Detector, backbone: Backbone) -> frozenset[str]:
    """The capabilities that a detector asks of this backbone; `attach` refuses one without them."""
    return detector._asks(backbone)


def leaves(*detectors: Detector) -> dict[Detector, str]:
    """The detectors that see images: these, or the members of fusions, or their members, ...; each once.

    Returns:
        Leaf -> the way to it through the members, for messages; "" for a detector that was given itself.

    Example:
        >>> leaves(create_detector("knn", backbone="tiny"))  # doctest: +SKIP
        {KNN(k=50): ''}
    """
    found: dict[Detector, str] = {}
    for leaf, way in (one for detector in detectors for one in _ways(detector, "")):
        found[leaf] = found.get(leaf, way) if way else ""  # one that is given itself is no member here
    return found


def _ways(detector: Detector, way: str) -> Iterator[tuple[Detector, str]]:
    if not detector.members:
        yield detector, way
    for name, member in detector.members.items():
        yield from _ways(member, f"{way} > {name}" if way else name)


def right_predictions(detector: Detector, features: FeatureSet, predicted: Tensor | None = None) -> Tensor | None:
    """Which predictions are right, bool [M], of the images whose label is one of the detector's `class_names`.

    Args:
        detector: a fitted one.
        features: of N images.
        predicted: `detector.predict(features)`, where it is there already.

    Returns:
        None for methods that do not classify, and for images without such labels.
    """
    if features.labels is None:
        return None
    predicted = detector.predict(features) if predicted is None else predicted
    labels = label_table(features.label_names, detector.class_names)[features.labels]
    return None if predicted is None or not bool((labels >= 0).any()) else (predicted == labels)[labels >= 0]
