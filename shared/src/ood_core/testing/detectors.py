"""What every detector keeps to, whatever its package.

A detector is fitted three times: once for all checks, and on one other set of images and then on the first again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ood_core.backbones.base import FEATURES, Backbone
from ood_core.data.sources import ImageFolder, ImageSource
from ood_core.detectors import create_detector
from ood_core.detectors.base import Detector
from ood_core.detectors.trained import TrainedDetector
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.features import FeatureSet, extract
from ood_core.fusion import Fusion
from ood_core.metrics import auroc
from ood_core.testing.checks import Check, close, refused, require, same
from ood_core.testing.subject import CLASSES, Factory, Subject, files

__all__ = ["check_detector", "detector_checks"]

# How far the AUROC may move with bfloat16 features, which hold three digits.
_AUROC_MOVES = 0.02


def check_detector(detector: str | Factory, *, backbone: Backbone | str = "tiny", **options: Any) -> None:
    """Check everything that every detector keeps to.

    It is fitted on generated images of three classes, saved, loaded, calibrated, copied, evaluated and fused, and given
    what it must refuse.

    Args:
        detector: a name of `list_detectors()`; or a function of `class_names`, `template` and options that makes one,
            such as its class. Loading goes by name, so it must have an entry point.
        backbone: what it reads images with; it must tell the generated images from noise.
        **options: of the detector, to keep a training short; on top of its `demo_options` if it is given by name.

    Raises:
        AssertionError: the first thing that does not hold.

    Example:
        >>> check_detector("knn", k=3)
    """
    for check in detector_checks(detector, backbone=backbone, **options):
        check()


def detector_checks(detector: str | Factory, *, backbone: Backbone | str = "tiny", **options: Any) -> list[Check]:
    """The checks of `check_detector`, to be called one by one; nothing is computed before.

    Args:
        detector: see `check_detector`.
        backbone: see `check_detector`.
        **options: of the detector.

    Example:
        >>> [str(check) for check in detector_checks("mcm")][0]
        'mcm-one_finite_score_per_image'
    """
    name = detector if isinstance(detector, str) else getattr(detector, "name", type(detector).__name__)
    on = Subject(detector, backbone, options)
    return [Check(name, function, on) for function in _CHECKS]


# ---- scores


def one_finite_score_per_image(on: Subject) -> None:
    """Float32, without gradient."""
    for name, features in on.ready.features.items():
        scores = on.ready.scores(name)
        require(scores.dtype == torch.float32, f"Scores must be float32, not {scores.dtype}.")
        require(scores.shape == (len(features),), f"{len(features)} images have scores of shape {list(scores.shape)}.")
        require(scores.isfinite().all(), f"{int((~scores.isfinite()).sum())} scores of {name!r} are not finite.")
        require(not scores.requires_grad, "Scores must carry no gradient.")


def known_images_score_higher_than_noise(on: Subject) -> None:
    """Higher = more in-distribution."""
    found = auroc(on.ready.scores("train"), on.ready.scores("noise"))
    require(found > 0.5, f"Scores must be higher for known images: the AUROC against noise is {found:.3f}.")


def images_are_scored_as_their_features(on: Subject) -> None:
    """In any order, batch and number of workers."""
    detector, scores = on.ready.detector, on.ready.scores("test")
    source = ImageFolder(on.bench.folders["test"])
    same(detector.score(source), scores, "Images and their features must have the same scores.")
    same(detector.score(source, workers=2), scores, "Worker processes must change no score.")
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    shuffled = detector.score(source.subset(order.numpy()))
    close(shuffled, scores[order], "The order of the images must change no score.")
    close(detector.score(source, batch_size=1), scores, "The batch size must change no score.")


def a_single_image_is_scored_as_its_features(on: Subject) -> None:
    """A PIL image."""
    detector = on.ready.detector
    with Image.open(files(on.bench.folders["test"])[0]) as image:
        alone = extract(detector.backbone, [image], detector.needs)  # type: ignore[arg-type]  # it has one
        same(detector.score(image), detector.score_features(alone), "An image must be scored as its features.")


def a_score_depends_on_no_other_image(on: Subject) -> None:
    """Nor does a prediction."""
    detector, features, scores = on.ready.detector, on.ready.features["test"], on.ready.scores("test")
    told = "An image's score must depend on no other image."
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    close(detector.score_features(features[order]), scores[order], f"{told} In another order it moves.")
    alone = [detector.score_features(features[i : i + 1]) for i in range(len(features))]
    close(torch.cat(alone), scores, f"{told} Alone it moves.")
    both = FeatureSet.concatenate([features, on.ready.features["noise"]])
    close(detector.score_features(both)[: len(scores)], scores, f"{told} Among others it moves.")
    predicted = detector.predict(features)
    if predicted is not None:
        same(detector.predict(features[order]), predicted[order], "A prediction must depend on no other image.")  # type: ignore[arg-type]  # it classifies


def the_precision_of_features_changes_little(on: Subject) -> None:
    """Features in float64 and in bfloat16."""

    def scores(name: str, dtype: torch.dtype) -> Tensor:
        return on.ready.detector.score_features(_converted(on.ready.features[name], lambda value: value.to(dtype)))

    close(scores("test", torch.float64), on.ready.scores("test"), "Features in float64 must give the same scores.")
    plain, rounded = ([of("test"), of("noise")] for of in (on.ready.scores, lambda one: scores(one, torch.bfloat16)))
    require(all(part.dtype == torch.float32 for part in rounded), "Scores of bfloat16 features must be float32.")
    moved = abs(auroc(*plain) - auroc(*rounded))
    require(moved < _AUROC_MOVES, f"With bfloat16 features the AUROC moves by {moved:.3f}.")


# ---- decisions


def decisions_follow_from_the_scores(on: Subject) -> None:
    """The threshold is the highest that keeps the share; p-values are conformal."""
    detector, features = on.ready.detector, on.ready.features["test"]
    scores, known = on.ready.scores("test"), on.ready.scores("held")
    below = scores < _check_threshold(detector, known, 0.9)
    for data in (features, scores):
        same(detector.is_ood(data), below, "OOD must be what is below the threshold.")
        _check_p_values(detector.p_value(data), scores, known)
    same(detector.is_ood(on.bench.folders["test"]), below, "Images must be judged as their features.")


def calibration_on_plain_numbers(on: Subject) -> None:
    """Scores as a tensor or a list, and every share."""
    detector, known = copy.deepcopy(on.ready.detector), torch.linspace(0, 1, 40)
    for tpr in (0.95, 0.9, 1.0):
        require(detector.calibrate(known, tpr) is detector, "calibrate must return the detector.")
        _check_threshold(detector, known, tpr)
    require(detector.is_ood([-1.0, 2.0]).tolist() == [True, False], "Below the threshold is OOD, above it is not.")
    scores = torch.tensor([-1.0, 0.0, 0.3333, 2.0])
    _check_p_values(detector.p_value(scores.tolist()), scores, known)


def _check_threshold(detector: Detector, known: Tensor, tpr: float) -> float:
    threshold = detector.threshold
    if threshold is None:
        raise AssertionError("calibrate must set a threshold.")
    kept = (known >= threshold).double().mean().item()
    require(kept >= tpr, f"The threshold must keep a share {tpr} of the known images, it keeps {kept:.3f}.")
    kept = (known > threshold).double().mean().item()
    require(kept < tpr, f"A higher threshold would keep a share {kept:.3f} of the known images, {tpr} is asked.")
    return threshold


def _check_p_values(found: Tensor, scores: Tensor, known: Tensor) -> None:
    expected = torch.stack([(1 + (known <= one).sum()) / (len(known) + 1) for one in scores])
    close(found, expected, "A p-value is (1 + calibration scores at or below) / (n + 1).", atol=0)


def images_it_was_fitted_on_set_no_threshold(on: Subject) -> None:
    """Of it and of what is loaded."""
    folder, held = on.bench.folders["train"], on.ready.features["held"]
    loaded = Detector.from_pretrained(on.ready.fitted, backbone=on.bench.backbone)
    for one in (copy.deepcopy(on.ready.detector), loaded):
        for data in (on.ready.features["train"], ImageFolder(folder)):
            if on.learns:
                words = "24 of the 24 calibration images are among those"
                refused("Calibrating on the images of the fit", DataError, words, one.calibrate, data)
            one.calibrate(data, allow_overlap=True)
            require(one.threshold is not None, "allow_overlap=True must take images of the fit.")
        require(one.calibrate(held).threshold is not None, "Held-out images must set a threshold.")


# ---- saved, loaded, copied, fitted again


def loaded_and_copied_it_gives_the_same_bits(on: Subject) -> None:
    """`config.json` and `model.safetensors` hold all of it."""
    ready = on.ready
    written = {path.name for path in ready.calibrated.iterdir()}
    require({"config.json", "model.safetensors"} <= written, f"Saved were {sorted(written)}.")
    here = Detector.from_pretrained(ready.calibrated, backbone=on.bench.backbone)
    typed = on.kind.from_pretrained(ready.calibrated, backbone=on.bench.backbone)
    alone, clone = Detector.from_pretrained(ready.calibrated), copy.deepcopy(ready.detector)
    others = {"Loaded": here, "Loaded by its class": typed, "Loaded without a backbone": alone, "Copied": clone}
    if on.bench.by_spec:
        scores = Detector.from_pretrained(ready.calibrated).score(on.bench.folders["test"])
        same(scores, ready.scores("test"), "Loaded with its backbone, it must score images as before.")
    for how, other in others.items():
        _check_twin(how, other, ready.detector, [ready.features[part] for part in ("test", "noise")])


def _check_twin(how: str, other: Detector, original: Detector, sets: list[FeatureSet]) -> None:
    require(type(other) is type(original), f"{how}, it is a {type(other).__name__}.")
    params, expected = other.get_params(), original.get_params()
    require(params == expected, f"{how}, its options are {params}, not {expected}.")
    require(other.class_names == original.class_names, f"{how}, its class names are {other.class_names}.")
    require(other.template == original.template, f"{how}, its template is {other.template!r}.")
    if isinstance(original, TrainedDetector):
        require(other.history == original.history, f"{how}, it must have the record of its training.")  # type: ignore[attr-defined]  # of the same class
    for features in sets:
        for call in ("score_features", "predict", "is_ood", "p_value"):
            found, before = (getattr(one, call)(features) for one in (other, original))
            if before is not None:
                same(found, before, f"{how}, {call} must give the same bits.")


def a_loaded_one_refuses_another_backbone(on: Subject) -> None:
    """One of other weights."""
    other = on.bench.backbone.copy()
    if names := other.linears():
        linear = other.linear(names[0])
        linear.set(linear.weight * 1.5)
        words = f"was made with backbone '{other.spec}"
        refused(
            "A backbone of other weights", UsageError, words, on.kind.from_pretrained, on.ready.fitted, backbone=other
        )


def options_make_an_equal_one(on: Subject) -> None:
    """`get_params` and `set_params`."""
    params = on.ready.detector.get_params()
    twin = create_detector(on.name, backbone=on.bench.backbone, class_names=CLASSES, **params)
    require(twin.get_params() == params, f"Made with {params}, it has {twin.get_params()}.")
    require(twin.set_params(**params) is twin, "set_params must return the detector.")
    require(twin.get_params() == params, f"Given {params}, it has {twin.get_params()}.")
    require(on.ready.detector.get_params() == params, "Making another one changed its options.")


def a_fit_forgets_the_one_before(on: Subject) -> None:
    """Byte by byte the files of a detector that was fitted only once, with the same seed."""
    again, detector, features = on.refitted, on.refitted.detector, on.ready.features["test"]
    require(again.threshold is not None, "evaluate(calibrate=) must calibrate it.")
    require(detector.threshold is None, "A fit must forget the calibration.")
    words = r"has not been calibrated: call calibrate"
    refused("Decisions after a fit", NotFittedError, words, detector.is_ood, features)
    folder = on.bench.new_folder()
    detector.save_pretrained(folder)
    written, expected = (
        {p.relative_to(root): p.read_bytes() for p in files(root)} for root in (folder, on.ready.fitted)
    )
    require(set(written) == set(expected), f"After two fits the files are {sorted(map(str, written))}.")
    other = [str(path) for path in expected if written[path] != expected[path]]
    require(not other, f"After two fits other bytes are in {', '.join(other)}: the first has left something.")
    same(detector.score_features(features), on.ready.scores("test"), "The second fit must give the scores of one fit.")


def _bytes(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in files(folder)}


def a_copy_shares_nothing_that_a_fit_changes(on: Subject) -> None:
    """`copy.deepcopy`."""
    clone, scores = copy.deepcopy(on.ready.detector), on.ready.scores("test")
    on.bench.fit(clone, "train")
    require(clone.threshold is None, "A fit must forget the calibration of the copy.")
    require(on.ready.detector.threshold is not None, "A fit of a copy must leave the original's calibration.")
    same(on.ready.scores("test"), scores, "A fit of a copy must leave the original's scores.")


# ---- what stays as it was


def a_fit_changes_nothing_outside(on: Subject) -> None:
    """Backbone, images, random numbers, class names."""
    for what, value in on.refitted.before.items():
        require(on.refitted.after[what] == value, f"A fit must leave the {what} as they were.")


def features_are_not_changed(on: Subject) -> None:
    """By no call."""
    features, detector = on.ready.features["held"], copy.deepcopy(on.ready.detector)
    before = copy.deepcopy(features)
    if not detector.changes_backbone:
        detector.fit(features)
    detector.calibrate(features, allow_overlap=True)
    for call in (detector.score_features, detector.predict, detector.is_ood, detector.p_value):
        call(features)
    require((features.ids, features.label_names) == (before.ids, before.label_names), "Ids or label names changed.")
    for name in _columns(features):
        same(features.get(name), before.get(name), f"A call changed the features {name!r}.")


# ---- in company


def evaluate_fits_calibrates_and_judges(on: Subject) -> None:
    """The figures are those of the scores."""
    evaluation, name = on.refitted.evaluation, on.name
    known, noise = (torch.from_numpy(evaluation.scores.scores(name, part).copy()) for part in ("id", "noise"))
    close(known.float(), on.refitted.scores, "evaluate must give the scores of score_features.")
    figures = evaluation.results["detectors"][name]["per_set"]["noise"]
    require(abs(figures["auroc"] - auroc(known, noise)) < 1e-12, "The AUROC must be that of the scores.")
    require(figures["n"] == len(noise), f"{len(noise)} images are counted as {figures['n']}.")


def a_member_of_a_fusion(on: Subject) -> None:
    """Fused with kNN it gives the mean p-value, and so does the saved fusion."""
    bench, detector = on.bench, on.ready.detector
    partner = create_detector("knn", backbone=bench.backbone)
    bench.fit(partner, "train")
    fused = Fusion({"this": detector, "partner": partner})

    def both(name: str) -> Any:
        """Of every backbone once."""
        own = on.ready.features[name]
        return own if own.fingerprint == bench.backbone.fingerprint else [own, bench.read(partner, name)]

    fused.calibrate(both("held"))
    partner.calibrate(bench.read(partner, "held"))
    expected = (detector.p_value(on.ready.features["test"]) + partner.p_value(bench.read(partner, "test"))) / 2
    scores = fused.score_features(both("test"))
    close(scores, expected, "A fusion must give the mean p-value.", atol=0)
    of_images = fused.score(bench.folders["test"], cache=bench.cache)
    close(of_images, scores, "A fusion must score images as their features.", atol=0)
    folder = bench.new_folder()
    fused.save_pretrained(folder)
    if bench.by_spec:
        same(Detector.from_pretrained(folder).score_features(both("test")), scores, "A loaded fusion must score alike.")


# ---- refusals


def features_that_are_no_numbers_are_refused(on: Subject) -> None:
    """NaN and infinite ones, to score and to decide on."""
    features, detector = on.ready.features["test"], on.ready.detector
    for value in (float("nan"), float("inf")):
        for name in sorted(detector.needs):
            broken = _converted(features, partial(_spoilt, value=value), [name])
            for call in (detector.score_features, detector.predict, detector.is_ood):
                refused(f"{name!r} with {value} in {call.__name__}", DataError, r"(?i)NaN or infinite", call, broken)


def features_to_fit_on_that_are_no_numbers_are_refused(on: Subject) -> None:
    """Before anything is learned."""
    if not on.ready.detector.changes_backbone:
        broken = _converted(on.ready.features["train"], partial(_spoilt, value=float("nan")))
        refused("NaN in fit", DataError, "NaN or infinite", copy.deepcopy(on.ready.detector).fit, broken)


def labels_of_a_training_are_checked(on: Subject) -> None:
    """Missing ones, a single class, others than the class names."""
    if not issubclass(on.kind, TrainedDetector):
        return
    backbone, images = on.bench.backbone, on.bench.images_to_fit(on.ready.detector, "train")

    def fit(class_names: list[str] | None = None, **changes: Any) -> None:
        detector = on.make(class_names=class_names)
        detector.attach(backbone)
        detector.fit(_relabelled(images, **changes))

    some = torch.as_tensor(images.labels).clone()
    some[[2, 5]] = -1
    refused("Images without labels", DataError, f"'{on.name}' needs labelled images to fit", fit, labels=None)
    refused("A label that is missing", DataError, "2 of the images to fit on have no label", fit, labels=some)
    refused("Labels that are no class", DataError, r"Labels \[.*\] are not among", fit, ["cat", "dog"])
    one = {"labels": torch.zeros_like(some), "label_names": CLASSES[:1]}
    refused("A single class", UsageError, "needs at least two classes", fit, **one)
    twice = [CLASSES[0], f" {CLASSES[0]}", CLASSES[2]]
    refused("Labels of the same name", UsageError, f"'{CLASSES[0]}'.* is given twice", fit, label_names=twice)


def features_of_nothing_or_of_something_else_are_refused(on: Subject) -> None:
    """No images, another backbone, other features."""
    features, score = on.ready.features["test"], on.ready.detector.score_features
    refused("No images", DataError, "empty", score, features[:0])
    elsewhere = replace(features, fingerprint="0" * 64, backbone="elsewhere")
    refused("Features of another backbone", UsageError, r"'elsewhere'.*Extract them again", score, elsewhere)
    nothing = replace(features, image=None, local=None, logits=None, local_logits=None, extra={})
    refused("Features without those it needs", UsageError, "Extract with needs=", score, nothing)


def before_the_fit_it_says_so(on: Subject) -> None:
    """One that needs no images needs a backbone and class names."""
    backbone = on.bench.backbone
    unfitted = on.create(backbone)
    if unfitted.fitted:
        unfitted = on.make()
    features = extract(unfitted.backbone or backbone, on.bench.folders["test"], unfitted.needs, cache=on.bench.cache)
    words = f"'{on.name}' has not been fitted: (call|create)"
    for call in (unfitted.score_features, unfitted.predict, unfitted.is_ood, unfitted.calibrate):
        refused(f"{call.__name__} before the fit", NotFittedError, words, call, features)


def before_the_calibration_it_says_so(on: Subject) -> None:
    """A fitted detector has scores, but no decisions."""
    detector = Detector.from_pretrained(on.ready.fitted, backbone=on.bench.backbone)
    words = f"'{on.name}' has not been calibrated: call calibrate"
    for call in (detector.is_ood, detector.p_value):
        refused(f"{call.__name__} before calibrate", NotFittedError, words, call, on.ready.features["test"])


def unknown_options_are_refused(on: Subject) -> None:
    """When it is made, and later."""
    words = f"Unknown option of '{on.name}' 'colour'"
    refused("An unknown option", UsageError, words, create_detector, on.name, colour="red")
    refused("An unknown option", UsageError, words, copy.deepcopy(on.ready.detector).set_params, colour="red")


def class_names_are_a_sequence_of_texts(on: Subject) -> None:
    """Of any kind; one class only where it says something."""
    for given in (tuple(CLASSES), np.array(CLASSES)):
        found = on.make(class_names=given).class_names
        require(found == CLASSES, f"class_names={given!r} is taken as {found}.")
    for wrong in ({"a": 1}, {"a", "b"}, ["a", None], [1, 2]):
        refused(f"class_names={wrong!r}", TypeError, "class_names", on.make, class_names=wrong)
    refused("A class given twice", UsageError, "'cat' is given twice", on.make, class_names=["cat", "dog", "cat"])
    if on.kind.least_classes > 1:
        words = rf"'{on.name}' needs at least two classes.*'knn'"
        refused("A single class", UsageError, words, on.make, class_names=["cat"])


_CHECKS: list[Callable[[Subject], None]] = [
    one_finite_score_per_image,
    known_images_score_higher_than_noise,
    images_are_scored_as_their_features,
    a_single_image_is_scored_as_its_features,
    a_score_depends_on_no_other_image,
    the_precision_of_features_changes_little,
    decisions_follow_from_the_scores,
    calibration_on_plain_numbers,
    images_it_was_fitted_on_set_no_threshold,
    loaded_and_copied_it_gives_the_same_bits,
    a_loaded_one_refuses_another_backbone,
    options_make_an_equal_one,
    a_fit_forgets_the_one_before,
    a_copy_shares_nothing_that_a_fit_changes,
    a_fit_changes_nothing_outside,
    features_are_not_changed,
    evaluate_fits_calibrates_and_judges,
    a_member_of_a_fusion,
    features_that_are_no_numbers_are_refused,
    features_to_fit_on_that_are_no_numbers_are_refused,
    labels_of_a_training_are_checked,
    features_of_nothing_or_of_something_else_are_refused,
    before_the_fit_it_says_so,
    before_the_calibration_it_says_so,
    unknown_options_are_refused,
    class_names_are_a_sequence_of_texts,
]


# ---- features with something changed


def _columns(features: FeatureSet) -> Iterator[str]:
    return (name for name in (*FEATURES, *features.extra) if features.get(name) is not None)


def _converted(
    features: FeatureSet, function: Callable[[Tensor], Tensor], names: list[str] | None = None
) -> FeatureSet:
    """Features with a function applied to these tensors of them, or to every one."""
    made = {name: function(features.get(name)) for name in (names or _columns(features))}
    own: dict[str, Any] = {name: value for name, value in made.items() if name not in features.extra}
    return replace(features, extra=features.extra | {name: made[name] for name in made if name not in own}, **own)


def _spoilt(tensor: Tensor, value: float) -> Tensor:
    return tensor.clone().index_fill_(0, torch.tensor([2]), value)


def _relabelled(images: FeatureSet | ImageSource, **changes: Any) -> FeatureSet | ImageSource:
    """The same images with other labels or label names."""
    if isinstance(images, FeatureSet):
        return replace(images, **changes)
    part = images.subset(slice(None))
    for name, value in changes.items():
        setattr(part, name, value.numpy() if isinstance(value, Tensor) else value)
    return part
