"""Decisions and their stated error rates, checked by simulation and against independent computations."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ood_core import Fusion, create_detector, evaluate
from ood_core.calibration import (
    Calibration,
    benjamini_hochberg,
    class_conditional_p_values,
    conformal_p_values,
    leave_one_out_p_values,
    threshold_at,
    tpr_interval,
)
from ood_core.data import ImageFolder, Manifest, scenes
from ood_core.detectors.base import Detector
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.evaluation import calibrate_detectors
from ood_core.features import FeatureSet, extract
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import binom


class FirstColumn(Detector):
    """The score is the first feature, the predicted class the second."""

    name = "first_column"

    @property
    def fitted(self):
        return True

    def _score(self, features):
        return features.image[:, 0]

    def _predict(self, features):
        return features.image[:, 1].long()


def set_of(scores, classes=None, prefix="i"):
    classes = np.zeros(len(scores)) if classes is None else classes
    image = torch.from_numpy(np.stack([scores, classes], 1)).float()
    return FeatureSet(ids=[f"{prefix}{i}" for i in range(len(image))], image=image)


# ---- threshold and interval


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_threshold_is_the_highest_that_accepts_enough(values, tpr):
    scores = torch.tensor(values).float()
    threshold = threshold_at(scores, tpr)
    assert (scores >= threshold).double().mean() >= tpr - 1e-9
    higher = scores[scores > threshold]
    assert not len(higher) or (scores >= higher.min()).double().mean() < tpr


@pytest.mark.parametrize(("n", "tpr"), [(20, 0.95), (200, 0.95), (57, 0.5), (33, 0.9)])
def test_interval_solves_the_binomial_equation(n, tpr):
    """At least k of n images lie above a point that a share x exceeds with probability P(Bin(n, x) >= k)."""
    accepted = int(np.ceil(tpr * n))
    for confidence in (0.95, 0.8):
        low, high = tpr_interval(n, tpr, confidence=confidence)
        tail = (1 - confidence) / 2
        assert binom.sf(accepted - 1, n, low) == pytest.approx(tail, rel=1e-6)
        assert binom.sf(accepted - 1, n, high) == pytest.approx(1 - tail, rel=1e-6)


def test_interval_holds_the_true_tpr_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n, tpr in ((25, 0.9), (100, 0.95)):
        low, high = tpr_interval(n, tpr)
        # of uniform scores a share 1 - t lies above t
        true = np.array([1 - threshold_at(torch.from_numpy(rng.random(n)), tpr) for _ in range(4000)])
        assert np.mean(true < low) == pytest.approx(0.025, abs=0.008)
        assert np.mean(true > high) == pytest.approx(0.025, abs=0.008)


def test_with_ties_the_lower_end_still_holds():
    rng = np.random.default_rng(1)
    low, _ = tpr_interval(40, 0.9)
    values = torch.from_numpy(rng.integers(0, 6, (3000, 40)))
    true = np.array([1 - threshold_at(row, 0.9) / 6 for row in values])
    assert np.mean(true < low) <= 0.03


@pytest.mark.parametrize("round_to", [6, 0])
def test_accepted_counts_what_the_threshold_of_each_tpr_accepts(round_to):
    rng = np.random.default_rng(1)
    known, fresh = (torch.from_numpy(rng.normal(size=size).round(round_to)).float() for size in (61, 47))
    tprs = [0.01, 0.5, 0.8, 0.95, 1.0]
    found = Calibration.of(known, 0.95).accepted(fresh, tprs)
    for tpr, share in zip(tprs, found, strict=True):
        threshold = max(t for t in known.tolist() if sum(s >= t for s in known.tolist()) >= tpr * 61 - 1e-9)
        assert share == pytest.approx(sum(s >= threshold for s in fresh.tolist()) / 47)
    with pytest.raises(ValueError, match="tpr=0"):
        Calibration.of(known, 0.95).accepted(fresh, [0.0])


def test_interval_refusals():
    with pytest.raises(ValueError, match="confidence=1"):
        tpr_interval(30, 0.9, confidence=1.0)
    with pytest.raises(ValueError, match=r"tpr=1\.5"):
        tpr_interval(30, 1.5)
    with pytest.raises(ValueError, match="n=0"):
        tpr_interval(0, 0.9)


# ---- p-values


def test_p_values_are_counted():
    rng = np.random.default_rng(2)
    reference, scores = rng.integers(0, 9, 37), rng.integers(-1, 10, 50)
    written = [(1 + sum(r <= s for r in reference)) / 38 for s in scores]
    found = conformal_p_values(torch.from_numpy(scores), torch.from_numpy(reference))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), written, rtol=1e-15)
    others = [(1 + sum(r <= s for j, r in enumerate(reference) if j != i)) / 38 for i, s in enumerate(reference)]
    np.testing.assert_allclose(leave_one_out_p_values(torch.from_numpy(reference)).numpy(), others, rtol=1e-15)


@pytest.mark.parametrize("ties", [False, True])
def test_false_alarms_are_as_rare_as_promised(ties):
    rng = np.random.default_rng(3)
    draw = (lambda size: rng.integers(0, 8, size).astype(float)) if ties else rng.standard_normal
    p = [
        float(conformal_p_values(torch.from_numpy(x[39:]), torch.from_numpy(x[:39])))
        for x in (draw(40) for _ in range(6000))
    ]
    for alpha in (0.05, 0.1, 0.5):
        alarms = np.mean(np.array(p) <= alpha + 1e-12)
        assert alarms <= alpha + 0.012
        assert ties or alarms == pytest.approx(alpha, abs=0.02)  # and no rarer: all multiples of 1 / 40 are reached


def test_by_class_holds_for_each_predicted_class():
    """Class 1 scores lower: against all images it is called OOD far too often, against its own it is not."""
    rng = np.random.default_rng(4)

    def draw(n):
        classes = rng.integers(0, 2, n)
        return set_of(rng.standard_normal(n) - 2 * classes, classes)

    plain, by_class, labels = [], [], []
    for _ in range(250):
        detector = FirstColumn().calibrate(draw(150))
        test = draw(30)
        plain.append(detector.p_value(test) <= 0.1)
        by_class.append(detector.is_ood(test, by_class=True))  # at 1 - tpr = 0.05
        labels.append(test.image[:, 1])
    labels, plain, by_class = (torch.cat(x).double() for x in (labels, plain, by_class))
    assert plain[labels == 1].mean() > 0.15
    for label in (0, 1):
        assert by_class[labels == label].mean() == pytest.approx(0.05, abs=0.012)


def test_by_class_written_out(caplog):
    rng = np.random.default_rng(5)
    classes = np.repeat([0, 1, 2, 3, 7], [30, 20, 12, 9, 1])
    scores = rng.permutation(len(classes)).astype(float)
    test_classes = np.array([0, 1, 2, 3, 7, 5, 0])
    test_scores = rng.random(7) * len(classes)
    pools = {c: scores[classes == c] for c in (0, 1)}
    rest = scores[classes > 1]  # 22 images of small classes are one class together; nobody was predicted as 5
    written = [
        (1 + (pools.get(c, rest) <= s).sum()) / (len(pools.get(c, rest)) + 1)
        for s, c in zip(test_scores, test_classes, strict=True)
    ]
    detector = FirstColumn().calibrate(set_of(scores, classes))
    found = detector.p_value(set_of(test_scores, test_classes), by_class=True)
    np.testing.assert_allclose(found.numpy(), written, rtol=1e-6)
    assert "4 of the predicted classes have fewer than 20 calibration images" in caplog.text
    assert found.dtype == torch.float32


def test_few_images_of_small_classes_are_compared_with_all():
    reference = torch.arange(30.0)
    classes = torch.tensor([0] * 25 + [1] * 5)
    found = class_conditional_p_values(torch.tensor([10.0, 10.0]), torch.tensor([0, 1]), reference, classes)
    assert found.tolist() == [12 / 26, 12 / 31]


def test_by_class_refusals(clustered):
    detector = FirstColumn().calibrate(set_of(np.arange(40.0), np.arange(40) % 4))
    with pytest.raises(DataError, match="No class has 20 calibration images"):
        detector.p_value(set_of(np.arange(3.0)), by_class=True)
    with pytest.raises(UsageError, match="p-values by class need features or images"):
        detector.p_value([0.5], by_class=True)
    knn = create_detector("knn", k=5).fit(clustered()).calibrate(clustered(1))
    with pytest.raises(UsageError, match="'knn' has no predicted class"):
        knn.is_ood(clustered(2), by_class=True)
    on_scores = FirstColumn().calibrate(torch.arange(40.0))
    with pytest.raises(UsageError, match="knows no predicted classes: calibrate again"):
        on_scores.p_value(set_of(np.arange(3.0)), by_class=True)


# ---- false discovery rate


def test_benjamini_hochberg_written_out():
    rng = np.random.default_rng(6)
    for _ in range(50):
        p = rng.random(23) ** 2
        ordered = np.sort(p)
        passing = np.flatnonzero(ordered <= 0.2 * np.arange(1, 24) / 23)
        limit = ordered[passing[-1]] if len(passing) else -1.0
        assert benjamini_hochberg(torch.from_numpy(p), 0.2).tolist() == (p <= limit).tolist()


def test_false_discoveries_stay_below_the_rate():
    rng = np.random.default_rng(7)
    shares, found, plain = [], [], []
    for _ in range(300):
        detector = FirstColumn().calibrate(torch.from_numpy(rng.standard_normal(300)).float(), tpr=0.9)
        scores = np.concatenate([rng.standard_normal(80), rng.standard_normal(20) - 4]).astype(np.float32)
        for kept, flagged in ((shares, detector.is_ood(scores, fdr=0.1)), (plain, detector.is_ood(scores))):
            kept.append(float(flagged[:80].sum() / max(1, flagged.sum())))
        found.append(float(detector.is_ood(scores, fdr=0.1)[80:].double().mean()))
    assert np.mean(shares) <= 0.1 * 0.8 + 0.01  # BH holds the rate times the share of ID images
    assert np.mean(shares) > 0.04  # and is not idle
    assert np.mean(found) > 0.8
    assert np.mean(plain) > 0.2  # what the threshold alone would give


def test_with_no_ood_image_hardly_anything_is_named():
    rng = np.random.default_rng(8)
    runs = [
        FirstColumn().calibrate(torch.from_numpy(x[:100])).is_ood(x[100:], fdr=0.1).any()
        for x in rng.standard_normal((600, 150)).astype(np.float32)
    ]
    assert np.mean(runs) <= 0.1 + 0.03


def test_a_rate_out_of_reach_is_refused():
    detector = FirstColumn().calibrate(torch.arange(50.0))
    with pytest.raises(DataError, match=r"no p-value is below 0.0196, so fdr=0.01.*at least 99"):
        detector.is_ood([0.0], fdr=0.01)
    assert FirstColumn().calibrate(torch.arange(99.0)).is_ood([-1.0], fdr=0.01).tolist() == [True]
    for wrong in (0, 1, -0.1, True):
        with pytest.raises(UsageError, match="fdr="):
            detector.is_ood([0.0], fdr=wrong)
    with pytest.raises(NotFittedError, match="not been calibrated"):
        FirstColumn().is_ood([0.0], fdr=0.1)


def test_by_class_and_rate_together():
    rng = np.random.default_rng(9)
    classes = rng.integers(0, 2, 600)
    detector = FirstColumn().calibrate(set_of(rng.standard_normal(600) - 3 * classes, classes))
    test = set_of(np.r_[rng.standard_normal(20), -4.0, -4.0], np.r_[np.zeros(20), 0, 1])
    assert detector.is_ood(test, fdr=0.2, by_class=True)[-2:].tolist() == [True, False]


# ---- what is kept


def test_the_record_of_a_calibration(small_backbone, image_folder):
    names = scenes.ID_CLASSES[:4]
    detector = create_detector("mcm", backbone=small_backbone, class_names=names)
    assert detector.calibration is None
    features = extract(small_backbone, image_folder)
    known = detector.calibrate(features, tpr=0.9).calibration
    assert (known.n, known.tpr, known.threshold) == (20, 0.9, detector.threshold)
    assert known.tpr_interval() == tpr_interval(20, 0.9)
    order = detector.score_features(features).sort(stable=True).indices
    assert torch.equal(known.classes, detector.predict(features)[order])
    on_images = detector.calibrate(image_folder).calibration
    assert on_images.data_hash == known.data_hash  # the same images, whatever they were given as
    assert torch.equal(on_images.classes, known.classes)
    twice = ImageFolder(image_folder).subset([*range(20), *range(20)])
    assert detector.calibrate(twice).calibration.data_hash != known.data_hash
    scores = torch.rand(30)
    hashes = {FirstColumn().calibrate(s).calibration.data_hash for s in (scores, scores.flip(0))}
    assert len(hashes) == 1
    assert FirstColumn().calibrate(scores + 1).calibration.data_hash not in hashes
    assert detector.set_params(temperature=0.5).calibration is None


def test_saved_with_the_detector_and_earlier_files_still_load(clustered, tmp_path):
    probe = create_detector("linear_probe", l2=1e-3).fit(clustered()).calibrate(clustered(1), tpr=0.9)
    probe.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    test = clustered(2)
    assert loaded.calibration.describe() == probe.calibration.describe()
    assert torch.equal(loaded.p_value(test, by_class=True), probe.p_value(test, by_class=True))
    assert not torch.equal(probe.p_value(test, by_class=True), probe.p_value(test))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["calibration"]["n"] == 120
    assert config["calibration"]["tpr_interval"] == list(tpr_interval(120, 0.9))
    del config["calibration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["calibration.classes"]
    save_file(tensors, tmp_path / "model.safetensors")
    earlier = Detector.from_pretrained(tmp_path)
    assert torch.equal(earlier.p_value(test), probe.p_value(test))
    assert torch.equal(earlier.is_ood(test, fdr=0.1), probe.is_ood(test, fdr=0.1))
    assert earlier.calibration.tpr_interval() == probe.calibration.tpr_interval()
    with pytest.raises(UsageError, match="calibrate again"):
        earlier.p_value(test, by_class=True)


def test_results_say_how_the_threshold_was_set(clustered):
    found = evaluate(
        create_detector("knn", k=5), id=clustered(1), ood={"far": clustered(2, far=True)}, fit=clustered(),
        calibrate=clustered(3),
    )  # fmt: skip
    record = found.results["detectors"]["knn"]["calibration"]
    assert (record["n"], record["confidence"]) == (120, 0.95)
    assert record["tpr_interval"] == list(tpr_interval(120, 0.95))
    assert len(record["data_hash"]) == 16


def test_scores_that_are_no_numbers_are_never_a_decision():
    class Logarithm(FirstColumn):
        def _score(self, features):
            return super()._score(features).log()

    detector = Logarithm()
    with pytest.raises(DataError, match=r"gave no number \(NaN\) for 1 of 30"):
        detector.calibrate(set_of(np.r_[np.arange(1.0, 30.0), -1.0]))
    detector.calibrate(set_of(np.arange(1.0, 31.0)))
    for decide in (detector.is_ood, detector.p_value):
        with pytest.raises(DataError, match="1 of 2 images"):
            decide(set_of([1.0, -1.0]))


def test_least_calibration_and_repetition():
    with pytest.raises(DataError, match="19 calibration images are too few"):
        Calibration.of(torch.arange(19.0), 0.95)
    assert Calibration.of(torch.arange(20.0), 0.95).threshold == 1.0


# ---- what cannot be calibrated on


@pytest.mark.parametrize("value", [-np.inf, np.inf])
def test_infinite_calibration_scores_are_refused_and_counted(value):
    scores = torch.linspace(0, 1, 40)
    scores[[3, 17]] = value
    with pytest.raises(DataError, match="2 of 40 calibration scores are infinite"):
        FirstColumn().calibrate(scores)
    with pytest.raises(DataError, match="2 of 40"):
        FirstColumn().calibrate(set_of(scores.numpy()))
    known = FirstColumn().calibrate(torch.linspace(0, 1, 40))
    assert known.is_ood(scores[[3, 17]]).tolist() == [value < 0] * 2


def test_constant_calibration_scores_are_refused_with_their_number_and_value():
    with pytest.raises(DataError, match=r"All 30 calibration scores are 0\.25"):
        FirstColumn().calibrate(torch.full((30,), 0.25))
    FirstColumn().calibrate(torch.cat([torch.full((29,), 0.25), torch.tensor([0.5])]))


# ---- held-out images


class Mean(Detector):
    """Learns the mean of the features; the score is minus the distance to it."""

    name = "mean"

    def _fit(self, features):
        self.state = {"mean": features.image.mean(0)}

    def _score(self, features):
        return -(features.image - self.state["mean"]).norm(dim=1)


def random_set(images, seed, **fields):
    generator = torch.Generator().manual_seed(seed)
    return FeatureSet(ids=[str(i) for i in range(images)], image=torch.randn(images, 4, generator=generator), **fields)


@pytest.mark.parametrize("fields", [{}, {"source": "abc"}])
def test_fitted_features_cannot_set_the_threshold(fields):
    features = random_set(100, 0, **fields)
    detector = Mean().fit(features[:60])
    with pytest.raises(DataError, match=r"20 of the 60 calibration images are among those that 'mean' was fitted on"):
        detector.calibrate(features[40:])
    assert detector.threshold is None
    detector.calibrate(features[60:])
    detector.calibrate(random_set(100, 1, **({"source": "other"} if fields else {})))  # same ids, other images
    assert detector.calibrate(features[40:], allow_overlap=True).threshold is not None
    detector.calibrate(torch.linspace(0, 1, 40))
    others = random_set(100, 3)
    detector.fit(others)  # forgets the first
    with pytest.raises(DataError, match="100 of the 100"):
        detector.calibrate(others)
    detector.calibrate(features)


def test_fitted_images_are_known_again_in_every_source_that_holds_them(small_backbone, tmp_path):
    folder = scenes.write_folder(scenes.render(sorted(scenes.ID_CLASSES)[:3], 24, seed=1), tmp_path / "images")
    source = ImageFolder(folder)
    first, second = (source.subset(slice(start, None, 2)) for start in (0, 1))
    detector = create_detector("knn", backbone=small_backbone)
    detector.fit(extract(small_backbone, first, {"image"}))
    detector.calibrate(second).save_pretrained(tmp_path / "saved")
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,id\n" + "".join(f"images/{id},{i}\n" for i, id in enumerate(first.ids)))
    one_class = folder / sorted(scenes.ID_CLASSES)[0]
    for known in (detector, Detector.from_pretrained(tmp_path / "saved", backbone=small_backbone)):
        for overlapping, count in (
            (folder, "36 of the 72"),
            (source.subset(slice(20)), "10 of the 20"),
            (extract(small_backbone, first, {"image"}, batch_size=3), "36 of the 36"),
            (Manifest(manifest), "36 of the 36"),
            (ImageFolder(one_class), "12 of the 24"),
        ):
            with pytest.raises(DataError, match=count):
                known.calibrate(overlapping)
        known.calibrate(folder, allow_overlap=True)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved["fitted_on"].dtype == torch.int64
    assert saved["fitted_on"].shape == (36,)
    clusters = create_detector("mahalanobis", backbone=small_backbone).fit(extract(small_backbone, second, {"image"}))
    fusion = Fusion([detector, clusters])
    for name, overlapping in (("knn", first), ("mahalanobis", second)):
        with pytest.raises(DataError, match=f"'{name}' was fitted on"):
            fusion.calibrate(overlapping)
        with pytest.raises(DataError, match=f"'{name}' was fitted on"):
            calibrate_detectors({"fusion": fusion}, overlapping)
    calibrate_detectors({"fusion": fusion}, first, allow_overlap=True)
    with pytest.raises(DataError, match="36 of the 72"):
        evaluate(detector, id=folder, ood={"same": folder}, calibrate=folder)


def test_detectors_that_learn_nothing_from_images_take_any(small_backbone, image_folder):
    features = extract(small_backbone, image_folder)
    names = ["striped star", "dotted ring", "brick square", "glossy circle"]
    for name in ("mcm", "msp", "energy"):
        detector = create_detector(name, backbone=small_backbone, class_names=names)
        assert detector.fit(features).calibrate(features).threshold is not None


def test_images_in_memory_are_known_by_their_pixels(small_backbone):
    images = [Image.effect_noise((16, 16), 60 + i).convert("RGB") for i in range(45)]
    features = extract(small_backbone, images[:25], {"image"})
    detector = create_detector("knn", backbone=small_backbone).fit(features)
    with pytest.raises(DataError, match="5 of the 25"):
        detector.calibrate(images[20:])
    detector.calibrate(images[25:])


def test_decisions_of_a_calibration():
    known = Calibration.of(torch.arange(100.0), 0.9, classes=torch.arange(100) % 2)
    scores = torch.tensor([-1.0, 9.0, 10.0, 50.0])
    assert known.is_ood(scores).tolist() == [True, True, False, False]
    assert torch.equal(known.is_ood(scores, fdr=0.5), benjamini_hochberg(known.p_values(scores), 0.5))
    classes = torch.zeros(4).long()
    assert torch.equal(known.is_ood(scores, classes), known.p_values(scores, classes) <= 0.1 + 1e-9)
    with pytest.raises(DataError, match=r"fdr=0\.001 would never name an image"):
        known.is_ood(scores, fdr=0.001)
