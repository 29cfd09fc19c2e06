"""What every registered detector keeps to, whatever its package: one suite, run once for every name.

Each detector is fitted three times: once for all tests, and on one other set of images and then on the first again.
"""

import copy
import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from ood_core import Fusion, ImageFolder, create_backbone, create_detector, evaluate, extract, list_detectors
from ood_core.backbones.base import hash_tensors
from ood_core.data import scenes
from ood_core.detectors import detector_class
from ood_core.detectors.base import Detector
from ood_core.detectors.zero_shot import ZeroShot
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.evaluation import Evaluation
from ood_core.features import FeatureSet
from ood_core.metrics import auroc

CLASSES = sorted(scenes.ID_CLASSES[:3])
# Where the demo's options would still take long.
BRIEF = {
    "hvl": {"epochs": 10},
    "iim": {"epochs": 2, "negative_prompts": 3, "context_length": 4, "batch_size": 12},
    "mofe": {"epochs": 1, "experts": 2, "batch_size": 12},
    "neg_label": {"max_words": 60, "groups": 2},
    "setar": {"ratios": [0.0, 0.4], "scorer": "gl_mcm"},
}
# Of float32 sums in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
# Of bfloat16 features, which hold three digits.
AUROC_MOVES = 0.02


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Image folders: three classes to fit on, to calibrate on and to score; two to fit on before; and noise."""
    root = tmp_path_factory.mktemp("data")
    sets = {
        "train": scenes.render(CLASSES, 8, seed=1),
        "held": scenes.render(CLASSES, 7, seed=2),
        "test": scenes.render(CLASSES, 3, seed=3),
        "earlier": scenes.render(CLASSES[1:], 7, seed=4),
        "noise": scenes.noise(9),
    }
    return {name: scenes.write_folder(made, root / name) for name, made in sets.items()}


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny")


def create(name, backbone, class_names=CLASSES):
    """Learned class names are those of the labels; detectors that learn nothing must be told."""
    kind = detector_class(name)
    names = class_names if issubclass(kind, ZeroShot) else None
    return create_detector(name, backbone=backbone, class_names=names, **{**kind.demo_options, **BRIEF.get(name, {})})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Keeps features where the last bits do not matter; they do, with the place in memory, in sums over features."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def read(folders):
    """(detector, name of a set) -> features; those of the plain backbone are extracted once for all detectors."""
    found = {}

    def features(detector, name):
        key = detector.backbone.fingerprint, name
        if key not in found:
            own = detector.needs - {"image", "local"}
            found[key] = extract(detector.backbone, folders[name], own or {"image", "local"})
        return found[key]

    return features


def fit(detector, name, folders, read):
    return detector.fit(folders[name] if detector.changes_backbone else read(detector, name))


class Ready(NamedTuple):
    """A fitted and calibrated detector with the features of every set, and where it was saved before and after."""

    detector: Detector
    features: dict[str, FeatureSet]
    fitted: Path
    calibrated: Path

    def scores(self, name):
        return self.detector.score_features(self.features[name])


@pytest.fixture(scope="module", params=list_detectors())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def ready(name, tiny, folders, read, tmp_path_factory):
    root = tmp_path_factory.mktemp(name)
    detector = fit(create(name, tiny), "train", folders, read)
    detector.save_pretrained(root / "fitted")
    features = {one: read(detector, one) for one in folders}
    detector.calibrate(features["held"], 0.9).save_pretrained(root / "calibrated")
    return Ready(detector, features, root / "fitted", root / "calibrated")


class Second(NamedTuple):
    """A detector that `evaluate` fitted on two classes, then fitted on all three; the world before and after."""

    detector: Detector
    evaluation: Evaluation
    scores: torch.Tensor
    threshold: float
    before: dict
    after: dict


@pytest.fixture(scope="module")
def second(name, tiny, folders, read, cache):
    backbone, class_names = tiny.copy(), list(CLASSES)
    backbone.model.train()
    next(backbone.model.parameters()).requires_grad_(True)
    before = world(backbone, folders, class_names)
    detector = create(name, backbone, class_names)
    sets = {"id": folders["test"], "ood": {"noise": folders["noise"]}, "calibrate": folders["held"]}
    evaluation = evaluate({name: detector}, fit=folders["earlier"], **sets, cache=cache)
    scores, threshold = detector.score_features(read(detector, "test")), detector.threshold
    fit(detector, "train", folders, read)
    return Second(detector, evaluation, scores, threshold, before, world(backbone, folders, class_names))


def world(backbone, folders, class_names):
    """What a fit must leave as it was."""
    model = backbone.model
    return {
        "weights": hash_tensors(model.state_dict().items(), ""),
        "training": [module.training for module in model.modules()],
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


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def converted(features, function):
    """Features with a function applied to every tensor of them."""
    own = {one: function(value) for one in ("image", "local", "logits") if (value := features.get(one)) is not None}
    return replace(features, extra={one: function(value) for one, value in features.extra.items()}, **own)


# ---- scores


def test_one_finite_score_per_image_higher_for_training_images_than_for_noise(ready):
    for one, features in ready.features.items():
        scores = ready.scores(one)
        assert scores.dtype == torch.float32
        assert scores.shape == (len(features),)
        assert scores.isfinite().all()
        assert not scores.requires_grad
    assert auroc(ready.scores("train"), ready.scores("noise")) > 0.5


def test_images_are_scored_as_their_features_in_any_order_batch_and_number_of_workers(ready, folders):
    scores, source = ready.scores("test"), ImageFolder(folders["test"])
    assert torch.equal(ready.detector.score(source), scores)
    assert torch.equal(ready.detector.score(source, workers=2), scores)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ready.detector.score(source.subset(order.numpy())), scores[order], **ROUNDING)
    torch.testing.assert_close(ready.detector.score(source, batch_size=1), scores, **ROUNDING)


def test_a_score_depends_on_no_other_image(ready):
    features, scores = ready.features["test"], ready.scores("test")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ready.detector.score_features(features[order]), scores[order], **ROUNDING)
    alone = [ready.detector.score_features(features[i : i + 1]) for i in range(len(features))]
    torch.testing.assert_close(torch.cat(alone), scores, **ROUNDING)
    both = FeatureSet.concatenate([features, ready.features["noise"]])
    torch.testing.assert_close(ready.detector.score_features(both)[: len(scores)], scores, **ROUNDING)
    predicted = ready.detector.predict(features)
    if predicted is not None:
        assert torch.equal(ready.detector.predict(features[order]), predicted[order])


def test_the_precision_of_the_features_changes_little(ready):
    def scores(one, dtype):
        return ready.detector.score_features(converted(ready.features[one], lambda value: value.to(dtype)))

    torch.testing.assert_close(scores("test", torch.float64), ready.scores("test"), **ROUNDING)
    plain, rounded = ([of("test"), of("noise")] for of in (ready.scores, lambda one: scores(one, torch.bfloat16)))
    assert all(part.dtype == torch.float32 for part in rounded)
    assert abs(auroc(*plain) - auroc(*rounded)) < AUROC_MOVES


# ---- decisions


def test_decisions_and_p_values_follow_from_the_scores(ready, folders):
    detector, features = ready.detector, ready.features["test"]
    scores, known = ready.scores("test"), ready.scores("held")
    assert (known >= detector.threshold).double().mean() >= 0.9
    assert (known > detector.threshold).double().mean() < 0.9
    expected = torch.stack([(1 + (known <= one).sum()) / (len(known) + 1) for one in scores])
    for data in (features, scores):
        assert torch.equal(detector.is_ood(data), scores < detector.threshold)
        torch.testing.assert_close(detector.p_value(data), expected, rtol=1e-6, atol=0)
    assert torch.equal(detector.is_ood(folders["test"]), scores < detector.threshold)
    assert ((expected > 0) & (expected <= 1)).all()


def test_images_it_was_fitted_on_set_no_threshold_of_it_or_of_what_is_loaded(ready, tiny, folders):
    detector, held = copy.deepcopy(ready.detector), ready.features["held"]
    learns = not isinstance(detector, ZeroShot)
    for one in (detector, Detector.from_pretrained(ready.fitted, backbone=tiny)):
        for data in (ready.features["train"], ImageFolder(folders["train"])):
            if learns:
                with pytest.raises(DataError, match="24 of the 24 calibration images are among those"):
                    one.calibrate(data)
            assert one.calibrate(data, allow_overlap=True).threshold is not None
        assert one.calibrate(held).threshold is not None


# ---- saved, loaded, copied, fitted again


def test_a_loaded_detector_and_a_copy_give_the_same_bits(ready, tiny, folders):
    loaded = Detector.from_pretrained(ready.calibrated)
    here = Detector.from_pretrained(ready.calibrated, backbone=tiny)
    clone = copy.deepcopy(ready.detector)
    for one in (loaded, here, clone):
        assert type(one) is type(ready.detector)
        assert one.get_params() == ready.detector.get_params()
        assert one.class_names == ready.detector.class_names
        for part in ("test", "noise"):
            features = ready.features[part]
            assert torch.equal(one.score_features(features), ready.scores(part))
            assert torch.equal(one.is_ood(features), ready.detector.is_ood(features))
            assert torch.equal(one.p_value(features), ready.detector.p_value(features))
    assert torch.equal(loaded.score(folders["test"]), ready.scores("test"))


def test_options_make_an_equal_detector(ready, tiny):
    params = ready.detector.get_params()
    twin = create_detector(ready.detector.name, backbone=tiny, class_names=CLASSES, **params)
    assert twin.get_params() == params
    assert ready.detector.get_params() == params


def test_a_fit_forgets_the_one_before_and_its_calibration(ready, second, tmp_path):
    """Byte by byte the files of a detector that was fitted only once, with the same seed."""
    assert second.threshold is not None
    assert second.detector.threshold is None
    with pytest.raises(NotFittedError, match=r"has not been calibrated: call calibrate"):
        second.detector.is_ood(ready.features["test"])
    second.detector.save_pretrained(tmp_path)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in files(tmp_path)}
    assert written == {path.relative_to(ready.fitted): path.read_bytes() for path in files(ready.fitted)}
    assert torch.equal(second.detector.score_features(ready.features["test"]), ready.scores("test"))


def test_a_copy_shares_nothing_that_a_fit_changes(ready, folders, read):
    clone, scores = copy.deepcopy(ready.detector), ready.scores("test")
    fit(clone, "train", folders, read)
    assert clone.threshold is None
    assert ready.detector.threshold is not None
    assert torch.equal(ready.scores("test"), scores)


# ---- what stays as it was


def test_a_fit_leaves_the_backbone_the_images_and_random_numbers_alone(second):
    for what, value in second.before.items():
        assert second.after[what] == value, what


def test_features_are_not_changed(ready):
    features = ready.features["held"]
    before = copy.deepcopy(features)
    detector = copy.deepcopy(ready.detector)
    if not detector.changes_backbone:
        detector.fit(features)
    detector.calibrate(features, allow_overlap=True)
    for call in (detector.score_features, detector.predict, detector.is_ood, detector.p_value):
        call(features)
    assert (features.ids, features.label_names) == (before.ids, before.label_names)
    for one, value in before._columns().items():
        assert torch.equal(features.get(one), value), one


# ---- in company


def test_evaluate_fits_calibrates_and_judges(name, second, folders):
    scores = second.evaluation.scores
    np.testing.assert_allclose(scores.scores(name, "id"), second.scores.numpy(), **ROUNDING)
    expected = auroc(scores.scores(name, "id"), scores.scores(name, "noise"))
    figures = second.evaluation.results["detectors"][name]["per_set"]["noise"]
    assert figures["auroc"] == pytest.approx(expected, abs=1e-12)
    assert figures["n"] == 9


def test_a_member_of_a_fusion(ready, tiny, folders, tmp_path, read, cache):
    partner = create_detector("mcm", backbone=tiny, class_names=CLASSES)
    fused = Fusion({"this": ready.detector, "partner": partner})

    def both(one):
        """Of every backbone once."""
        own = ready.features[one]
        return own if own.fingerprint == tiny.fingerprint else [own, read(partner, one)]

    fused.calibrate(both("held"))
    partner.calibrate(read(partner, "held"))
    p_values = [ready.detector.p_value(ready.features["test"]), partner.p_value(read(partner, "test"))]
    scores = fused.score_features(both("test"))
    torch.testing.assert_close(scores, sum(p_values) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(fused.score(folders["test"], cache=cache), scores, rtol=1e-6, atol=0)
    fused.save_pretrained(tmp_path)
    assert torch.equal(Detector.from_pretrained(tmp_path).score_features(both("test")), scores)


# ---- refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused_by_name(ready, value):
    features = ready.features["test"]

    def spoil(tensor):
        return tensor.clone().index_fill_(0, torch.tensor([2]), value)

    for one in sorted(ready.detector.needs):
        own = {one: spoil(features.get(one))}
        broken = replace(features, extra=features.extra | own) if one in features.extra else replace(features, **own)
        for call in (ready.detector.score_features, ready.detector.predict, ready.detector.is_ood):
            with pytest.raises(DataError, match=r"(?i)NaN or infinite"):
                call(broken)


def test_features_to_fit_on_that_are_no_numbers_are_refused(ready):
    features = ready.features["train"]
    broken = converted(features, lambda value: value.clone().index_fill_(0, torch.tensor([2]), float("nan")))
    if not ready.detector.changes_backbone:
        with pytest.raises(DataError, match="NaN or infinite"):
            copy.deepcopy(ready.detector).fit(broken)


def test_features_of_nothing_or_of_something_else_are_refused(ready):
    features = ready.features["test"]
    with pytest.raises(DataError, match="empty"):
        ready.detector.score_features(features[:0])
    with pytest.raises(UsageError, match=r"'elsewhere'.*Extract them again"):
        ready.detector.score_features(replace(features, fingerprint="0" * 64, backbone="elsewhere"))
    with pytest.raises(UsageError, match="Extract with needs="):
        ready.detector.score_features(replace(features, image=None, local=None, extra={}))


def test_before_the_fit(name, tiny, folders, cache):
    unfitted = create(name, tiny)
    if unfitted.fitted:  # it needs no images, but a backbone and class names
        unfitted = create_detector(name)
    features = extract(unfitted.backbone or tiny, folders["test"], unfitted.needs, cache=cache)
    for call in (unfitted.score_features, unfitted.predict, unfitted.is_ood, unfitted.calibrate):
        with pytest.raises(NotFittedError, match=f"'{name}' has not been fitted: (call|create)"):
            call(features)


def test_before_the_calibration(ready):
    detector = Detector.from_pretrained(ready.fitted)
    for call in (detector.is_ood, detector.p_value):
        with pytest.raises(NotFittedError, match=rf"'{detector.name}' has not been calibrated: call calibrate"):
            call(ready.features["test"])


def test_unknown_options_are_refused(ready, tiny):
    with pytest.raises(UsageError, match=f"Unknown option of '{ready.detector.name}' 'colour'"):
        create_detector(ready.detector.name, backbone=tiny, class_names=CLASSES, colour="red")
    with pytest.raises(UsageError, match=f"Unknown option of '{ready.detector.name}' 'colour'"):
        copy.deepcopy(ready.detector).set_params(colour="red")


def test_class_names_of_every_kind_and_one_class(name, tiny):
    """Whatever the detector: sequences of strings are taken, others refused, one class only where it says something."""
    kind = detector_class(name)
    for given in (tuple(CLASSES), np.array(CLASSES)):
        assert create_detector(name, class_names=given).class_names == CLASSES
    for wrong in ({"a": 1}, {"a", "b"}, ["a", None], [1, 2]):
        with pytest.raises(TypeError, match="class_names"):
            create_detector(name, class_names=wrong)
    with pytest.raises(UsageError, match="'cat' is given twice"):
        create_detector(name, class_names=["cat", "dog", "cat"])
    if kind.least_classes > 1:
        with pytest.raises(UsageError, match=rf"'{name}' needs at least two classes.*'knn'"):
            create_detector(name, backbone=tiny, class_names=["cat"])
    else:
        assert name in {"energy", "knn", "mahalanobis", "max_logit", "neg_label", "vim"}
