"""Every detector: fitting, scoring, calibration, p-values, options, saving and loading; each against its equation."""

import copy
import errno
import json
import unicodedata
from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from ood_core import Fusion, ImageFolder, create_backbone, create_detector, functional, list_detectors
from ood_core.detectors import broken_detectors, detector_class
from ood_core.detectors.base import Detector, leaves, right_predictions
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError, WriteError
from ood_core.features import FeatureSet, extract
from ood_core.metrics import auroc
from ood_core.registry import DETECTORS
from PIL import Image
from safetensors import SafetensorError
from scipy.stats import spearmanr

CORE = ["energy", "gen", "gl_mcm", "knn", "linear_probe", "mahalanobis", "max_logit", "mcm", "msp", "r_mcm", "vim"]
CLASSES = ["striped star", "dotted ring", "brick square", "glossy circle"]


@pytest.fixture(scope="module")
def features(small_backbone, image_folder):
    return extract(small_backbone, image_folder)


@pytest.fixture(params=CORE)
def ready(request, small_backbone, features):
    """Each detector, fitted on features of the small backbone."""
    return create_detector(request.param, backbone=small_backbone, class_names=CLASSES).fit(features)


def test_the_registry_knows_them():
    assert set(CORE) <= set(list_detectors())
    assert not set(broken_detectors()) & set(CORE)
    assert all(detector_class(name).name == name for name in CORE)
    with pytest.raises(UsageError, match=r"Unknown detector 'mmc'. Did you mean 'mcm'"):
        create_detector("mmc")
    with pytest.raises(UsageError, match=r"Unknown option of 'mcm' 'temprature'. Did you mean 'temperature'"):
        create_detector("mcm", temprature=2.0)


def test_a_broken_plug_in_hides_nothing(monkeypatch):
    broken = EntryPoint("broken", "no_such_module:Nothing", "ood.detectors")
    found = {"broken": broken, "mcm": DETECTORS.entries["mcm"]}
    monkeypatch.setitem(DETECTORS.__dict__, "entries", found)
    assert list_detectors() == ["broken", "mcm"]
    assert "no_such_module" in broken_detectors()["broken"]
    assert create_detector("mcm").name == "mcm"
    with pytest.raises(UsageError, match=r"'broken'.*cannot be imported"):
        create_detector("broken")


def test_scores_equal_the_functions(small_backbone, features):
    text = small_backbone.encode_text([f"a photo of a {name}" for name in CLASSES])
    logits = small_backbone.logit_scale * features.image @ text.T
    bank = features.image
    expected = {
        "mcm": functional.mcm(features.image, text),
        "gl_mcm": functional.gl_mcm(features.image, features.local, text),
        "r_mcm": functional.r_mcm(features.image, features.local, text, k=4),  # a quarter of 16 patches
        "msp": functional.msp(logits),
        "max_logit": functional.max_logit(logits),
        "energy": functional.energy(logits),
        "gen": functional.gen(logits),
        "knn": functional.knn(features.image, bank, k=5),  # five images per class
    }
    for name, score in expected.items():
        detector = create_detector(name, backbone=small_backbone, class_names=CLASSES).fit(features)
        torch.testing.assert_close(detector.score_features(features), score, rtol=1e-5, atol=1e-6)


def test_scores_are_float32_and_independent_of_the_batch(ready, features):
    scores = ready.score_features(features)
    assert scores.dtype == torch.float32
    assert scores.shape == (20,)
    one_by_one = torch.cat([ready.score_features(features[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-5, atol=1e-6)


def test_scoring_images_equals_scoring_their_features(ready, features, image_folder):
    torch.testing.assert_close(ready.score(image_folder), ready.score_features(features), rtol=1e-6, atol=1e-7)
    with Image.open(image_folder / "brick square" / "00003.png") as image:
        alone = extract(ready.backbone, [image])
        torch.testing.assert_close(ready.score(image), ready.score_features(alone), rtol=0, atol=0)
    index = features.ids.index("brick square/00003.png")
    torch.testing.assert_close(alone.image, features.image[index : index + 1], rtol=1e-5, atol=1e-6)


def test_calibration_threshold_decision_and_p_values(ready, features):
    scores = torch.linspace(0, 1, 40)
    for tpr in (0.95, 0.9, 1.0):
        ready.calibrate(scores, tpr)
        accepted = (scores >= ready.threshold).double().mean()
        assert accepted >= tpr
        higher = scores[scores > ready.threshold]
        assert (scores >= higher.min()).double().mean() < tpr
    assert ready.is_ood([-1.0, 2.0]).tolist() == [True, False]
    written = [(1 + int((scores <= s).sum())) / 41 for s in (-1.0, 0.0, 0.3333, 2.0)]
    torch.testing.assert_close(ready.p_value([-1.0, 0.0, 0.3333, 2.0]), torch.tensor(written))
    ready.calibrate(features, allow_overlap=True)
    assert torch.equal(ready.is_ood(features), ready.score_features(features) < ready.threshold)
    assert ready.is_ood(features).dtype == torch.bool


def test_saved_and_loaded_is_the_same(ready, features, small_backbone, tmp_path):
    ready.calibrate(features, allow_overlap=True)
    ready.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (
        Detector.from_pretrained(tmp_path / "saved"),
        type(ready).from_pretrained(tmp_path / "saved", backbone=small_backbone),
    ):
        assert type(loaded) is type(ready)
        assert loaded.get_params() == ready.get_params()
        assert loaded.class_names == CLASSES
        assert torch.equal(loaded.score_features(features), ready.score_features(features))
        assert torch.equal(loaded.is_ood(features), ready.is_ood(features))
        assert torch.equal(loaded.p_value(features), ready.p_value(features))


def test_another_backbone_is_refused(ready, features, small_backbone, tmp_path):
    ready.save_pretrained(tmp_path)
    linear = small_backbone.linear("visual.0.up")
    with linear.edited(linear.weight * 1.5), pytest.raises(UsageError, match="was made with backbone 'small'"):
        Detector.from_pretrained(tmp_path, backbone=small_backbone)
    with pytest.raises(UsageError, match="These features are of backbone 'other'"):
        ready.score_features(replace(features, fingerprint="0" * 64, backbone="other"))


def test_params_round_trip(ready):
    params = ready.get_params()
    assert type(ready)(**params).get_params() == params
    assert ready.set_params(**params) is ready
    with pytest.raises(UsageError, match=r"Unknown option"):
        ready.set_params(colour="red")


def test_set_params_changes_the_score_and_drops_what_depended_on_it(small_backbone, features):
    detector = create_detector("mcm", backbone=small_backbone, class_names=CLASSES).calibrate(torch.rand(30))
    before = detector.score_features(features)
    detector.set_params(temperature=0.01)
    assert not torch.equal(detector.score_features(features), before)
    with pytest.raises(NotFittedError, match="not been calibrated"):
        detector.is_ood(before)
    with pytest.raises(ValueError, match="temperature=-1"):
        detector.set_params(temperature=-1)
    distance = create_detector("mahalanobis").fit(features)
    distance.set_params(shrinkage=0.5)
    with pytest.raises(NotFittedError, match="'mahalanobis' has not been fitted"):
        distance.score_features(features)


def test_use_before_fit_and_before_calibrate(features):
    for name in ("knn", "mahalanobis", "vim", "msp", "mcm"):
        with pytest.raises(NotFittedError, match=f"'{name}' has not been fitted"):
            create_detector(name).score_features(features)
    detector = create_detector("knn").fit(features)
    for call in (detector.is_ood, detector.p_value):
        with pytest.raises(NotFittedError, match="calibrate"):
            call(features)


def test_wrong_use_is_explained(small_backbone, features, image_folder, tmp_path):
    with pytest.raises(UsageError, match="pass class_names="):
        create_detector("mcm", backbone=small_backbone)
    with pytest.raises(TypeError, match="list of names"):
        create_detector("mcm", class_names="dog")
    with pytest.raises(UsageError, match="has no backbone"):
        create_detector("knn").fit(replace(features, fingerprint="")).score(image_folder)
    gl_mcm = create_detector("gl_mcm", backbone=small_backbone, class_names=CLASSES)
    with pytest.raises(UsageError, match=r"have no 'local'.*needs=\['image', 'local'\]"):
        gl_mcm.score_features(replace(features, local=None))
    with pytest.raises(TypeError, match="takes a FeatureSet"):
        create_detector("knn").fit(features.image)
    with pytest.raises(DataError, match="3 calibration images are too few"):
        create_detector("knn").fit(features).calibrate([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="NaN"):
        create_detector("knn").fit(features).calibrate([float("nan")] * 30)
    with pytest.raises(ValueError, match="tpr=0"):
        create_detector("knn").fit(features).calibrate(np.arange(30.0), tpr=0)
    with pytest.raises(DataError, match="no labels"):
        create_detector("mahalanobis").fit(replace(features, labels=None))
    with pytest.raises(DataError, match=r"'striped star'.*not among"):
        create_detector("mahalanobis", class_names=["dog", "cat"]).fit(features)
    with pytest.raises(DataError, match="at least two classes"):
        create_detector("msp", head="probe").fit(features[features.labels == 1])
    with pytest.raises(UsageError, match="has no 'logits'"):
        create_detector("msp", backbone=small_backbone, head="classifier")
    with pytest.raises(ValueError, match="head='linear'"):
        create_detector("msp", head="linear")
    with pytest.raises(MissingDataError, match="no folder with a saved detector"):
        Detector.from_pretrained(tmp_path / "nothing")
    create_detector("knn").fit(features).save_pretrained(tmp_path / "knn")
    saved = json.loads((tmp_path / "knn" / "config.json").read_text())
    (tmp_path / "knn" / "config.json").write_text(json.dumps(saved | {"params": {"q": 1}}))
    with pytest.raises(DataError, match="saved by another version"):
        Detector.from_pretrained(tmp_path / "knn")
    (tmp_path / "knn" / "config.json").write_text("{")
    with pytest.raises(DataError, match="no readable detector"):
        Detector.from_pretrained(tmp_path / "knn")
    (tmp_path / "config.json").write_text(json.dumps({"detector": "mcm"}))
    with pytest.raises(MissingDataError, match=r"model.safetensors is missing"):
        Detector.from_pretrained(tmp_path)


def test_features_are_refused_for_what_they_hold_and_not_for_their_sum(clustered):
    train = clustered()
    large = replace(train, image=(6e4 * train.image).half())  # their sum is beyond half precision
    assert large.image.sum().isinf()
    scores = create_detector("knn").fit(large).score_features(large)
    written = -torch.cdist(large.image.double(), large.image.double()).sort(dim=1).values[:, 39]
    torch.testing.assert_close(scores, written.float(), rtol=1e-5, atol=0)
    large.image[[4, 7], 3] = torch.tensor([float("nan"), -float("inf")]).half()
    with pytest.raises(
        DataError, match=r"'image' holds NaN or infinite values for 2 of 120 images, the first 'id-0-004'"
    ):
        create_detector("knn").fit(large)


def test_labels_are_matched_by_name_in_any_order(clustered):
    train = clustered()
    there = create_detector("mahalanobis", class_names=["c", "a", "b"]).fit(train)
    assert torch.equal(there._class_labels(train), (train.labels + 1) % 3)
    here = create_detector("mahalanobis").fit(train)
    assert here.class_names == ["a", "b", "c"]
    test = clustered(1)
    torch.testing.assert_close(there.score_features(test), here.score_features(test), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["knn", "mahalanobis", "linear_probe", "vim", "msp", "energy", "gen", "max_logit"])
def test_fitted_detectors_separate_clusters(name, clustered):
    options = {"knn": {}, "mahalanobis": {}, "linear_probe": {}}.get(name, {"head": "probe"})
    detector = create_detector(name, **options).fit(clustered())
    score = auroc(detector.score_features(clustered(1)), detector.score_features(clustered(2, far=True)))
    assert score > 0.95


def test_mahalanobis_equals_the_textbook(clustered):
    train, test = clustered(), clustered(1)
    x, y = train.image.double().numpy(), train.labels.numpy()
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    covariance = np.mean([np.outer(a - means[c], a - means[c]) for a, c in zip(x, y, strict=True)], 0)
    inverse = np.linalg.inv(covariance)
    written = [-min((q - m) @ inverse @ (q - m) for m in means) for q in test.image.double().numpy()]
    detector = create_detector("mahalanobis", shrinkage=0.0).fit(train)
    np.testing.assert_allclose(detector.score_features(test).numpy(), written, rtol=1e-4)


def test_vim_equals_the_textbook(clustered):
    train, test = clustered(), clustered(1)
    detector = create_detector("vim", head="probe", dimension=4).fit(train)
    weight, bias = detector.state["weight"].double().numpy(), detector.state["bias"].double().numpy()
    origin = -np.linalg.pinv(weight) @ bias
    x = train.image.double().numpy()
    values, vectors = np.linalg.eigh(np.cov((x - origin).T, bias=True) + np.outer(*[(x - origin).mean(0)] * 2))
    null_space = vectors[:, np.argsort(values)[:6]]
    alpha = (x @ weight.T + bias).max(1).mean() / np.linalg.norm((x - origin) @ null_space, axis=1).mean()
    q = test.image.double().numpy()
    logits = q @ weight.T + bias
    virtual = alpha * np.linalg.norm((q - origin) @ null_space, axis=1)
    written = np.log(np.exp(logits).sum(1)) - virtual
    np.testing.assert_allclose(detector.score_features(test).numpy(), written, rtol=1e-4, atol=1e-4)
    # the order of the paper's own score, the softmax probability of the virtual logit
    probability = np.exp(virtual) / (np.exp(virtual) + np.exp(logits).sum(1))
    assert (np.argsort(-probability) == np.argsort(written)).all()


def test_two_class_probe_equals_scikit_learn(clustered):
    from sklearn.linear_model import LogisticRegression

    train = clustered()[clustered().labels < 2]
    detector = create_detector("msp", head="probe").fit(train)
    expected = LogisticRegression(C=10.0, max_iter=2000, tol=1e-10)
    expected.fit(train.image.double().numpy(), train.labels.numpy())
    probability = expected.predict_proba(clustered(1).image.double().numpy()).max(1)
    np.testing.assert_allclose(detector.score_features(clustered(1)).numpy(), probability, rtol=1e-6)


def wide_clusters(images, seed, *, far=False):
    """Unit vectors of 512 dimensions around 8 directions, or other 8, of the same noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(512, 16, generator=torch.Generator().manual_seed(0)))[0].T
    labels = torch.arange(images) % 8
    x = centres[labels + 8 * far] + 0.05 * torch.randn(images, 512, generator=generator)
    return FeatureSet(
        ids=[f"{seed}-{i}" for i in range(images)],
        labels=labels,
        label_names=[f"class {i}" for i in range(8)],
        image=F.normalize(x, dim=-1),
    )


@pytest.mark.parametrize("images", [128, 256, 300, 1000])
def test_vim_keeps_a_residual_space_that_few_images_can_tell(images, caplog):
    train, test, far = wide_clusters(images, 1), wide_clusters(400, 2), wide_clusters(400, 3, far=True)
    detector = create_detector("vim").fit(train)
    assert auroc(detector.score_features(test), detector.score_features(far)) > 0.99
    null_space, origin = detector.state["null_space"], detector.state["origin"]
    assert null_space.shape == (512, 512 - min(256, images // 4))
    assert f"{images} images support" in caplog.text
    # of new images it is as large as of those it was learned from, nearly
    fitted, new = (((x.image.double() - origin) @ null_space).norm(dim=1).mean() for x in (train, test))
    assert fitted / new > 0.6
    asked = create_detector("vim", dimension=256).fit(train)
    assert torch.equal(asked.state["null_space"], null_space)


def test_vim_refuses_features_without_a_residual(clustered):
    train = clustered()
    copies = train[torch.arange(5).repeat(24) * 24]  # five images, 24 times each
    with pytest.raises(DataError, match="have no more than 5 dimensions"):
        create_detector("vim", dimension=5).fit(copies)
    flat = replace(train, image=F.normalize(train.image * (torch.arange(10) < 4), dim=-1))
    with pytest.raises(DataError, match=r"have no more than 4 dimensions.*smaller dimension"):
        create_detector("vim", dimension=4).fit(flat)


def test_vim_scales_the_residual_by_logits_of_any_sign(clustered, caplog):
    """Negative cosines: a direction that all images have and all texts have not."""
    train, test, far = (
        replace(one, image=F.normalize(torch.cat([one.image, torch.ones(120, 1)], 1)))
        for one in (clustered(), clustered(1), clustered(2, far=True))
    )
    detector = create_detector("vim", head="zero_shot", dimension=4)
    detector.state = {"weight": torch.eye(3, 11) - 5 * torch.eye(11)[10], "bias": torch.zeros(3)}
    detector.fit(replace(train, labels=None))
    assert "would switch the residual off" in caplog.text
    residual = ((train.image.double() - detector.state["origin"]) @ detector.state["null_space"]).norm(dim=1).mean()
    logits = detector.logits(train).double()
    assert logits.max() < 0
    torch.testing.assert_close(detector.state["alpha"], (logits.amax(1) - logits.mean(1)).mean() / residual)
    assert auroc(detector.score_features(test), detector.score_features(far)) > 0.95
    detector.state = {"weight": torch.ones(3, 11), "bias": torch.zeros(3)}
    detector.state["weight"] *= -1
    with pytest.raises(DataError, match="logits of all 3 classes are equal"):
        detector.fit(train)


@pytest.mark.parametrize("noise", [0.0, 3e-8])
def test_mahalanobis_refuses_classes_without_scatter(clustered, noise):
    train = clustered()
    one_each = train[[0, 40, 80]]
    equal = replace(train, image=train.image[train.labels * 40] + noise * torch.randn(120, 10))
    for features in (one_each, equal):
        with pytest.raises(DataError, match=r"No class has two different images.*at least two images per class"):
            create_detector("mahalanobis").fit(features)
    detector = create_detector("mahalanobis").fit(train[[0, 1, 40, 80]])
    assert len(detector.score_features(train).unique()) > 100


@pytest.mark.parametrize("name", ["mahalanobis", "vim", "msp", "energy", "linear_probe"])
def test_constant_features_are_refused(name, clustered):
    constant = replace(clustered(), image=clustered().image[:1].expand(120, -1))
    with pytest.raises(DataError, match=r"all the same|are the same|No class has two different"):
        create_detector(name).fit(constant)


def test_knn_on_constant_features_is_the_distance_to_them(clustered):
    constant = replace(clustered(), image=clustered().image[:1].expand(120, -1))
    detector = create_detector("knn").fit(constant)
    assert (detector.score_features(constant) == 0).all()
    written = -(clustered(1).image - constant.image[0]).norm(dim=1)
    torch.testing.assert_close(detector.score_features(clustered(1)), written, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"All 120 calibration scores are -?0"):
        detector.calibrate(replace(constant, ids=[f"new {i}" for i in range(120)], source="elsewhere"))


def test_detectors_tell_confident_images_apart(clustered, small_backbone, features):
    probe = create_detector("msp", head="probe", probe_c=1e9).fit(clustered())
    scaled = copy.deepcopy(probe)
    scaled.state["weight"] *= 50
    scaled.state["bias"] *= 50
    logits = scaled.logits(clustered(1)).double()
    top, index = logits.max(1, keepdim=True)
    odds = top[:, 0] - logits.scatter(1, index, -torch.inf).logsumexp(1)
    assert functional.msp(logits.float()).unique().numel() < 60
    scores = scaled.score_features(clustered(1))
    assert spearmanr(scores, odds).statistic > 1 - 1e-6
    linear = create_detector("linear_probe").fit(clustered())
    linear.state |= {name: scaled.state[name] for name in ("weight", "bias")}
    torch.testing.assert_close(linear.score_features(clustered(1)), scores)
    for name in ("mcm", "gl_mcm", "r_mcm"):
        cold = create_detector(name, backbone=small_backbone, class_names=CLASSES, temperature=1e-5)
        assert cold.score_features(features).unique().numel() == len(features)
    with pytest.raises(ValueError, match="local_weight=-1"):
        create_detector("gl_mcm", local_weight=-1)


# ---- precision


def test_a_detector_keeps_the_precision_it_was_fitted_in(image_folder, tmp_path, caplog):
    half = create_backbone("tiny", dtype="bfloat16")
    features = extract(half, image_folder, {"image"})
    assert features.dtype == features[:3].dtype == "bfloat16"
    for name, options in (("knn", {}), ("mcm", {"class_names": CLASSES})):
        detector = create_detector(name, backbone=half, **options).fit(features)
        detector.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["backbone"]["dtype"] == "bfloat16"
        for loaded in (
            Detector.from_pretrained(tmp_path / name),
            Detector.from_pretrained(tmp_path / name, backbone="tiny"),
        ):
            assert loaded.backbone.dtype == torch.bfloat16
            assert torch.equal(loaded.score(image_folder), detector.score(image_folder))
    assert not caplog.text
    full = create_backbone("tiny", dtype="float32")
    other = Detector.from_pretrained(tmp_path / "knn", backbone=full)
    assert "'tiny' computes in float32: scores move by up to 0.08 to 0.33 standard deviations" in caplog.text
    other.save_pretrained(tmp_path / "again")
    assert Detector.from_pretrained(tmp_path / "again").backbone.dtype == torch.bfloat16
    caplog.clear()
    in_full = extract(full, image_folder, {"image"})
    alone = create_detector("knn").fit(features)  # known from the features
    for _ in range(2):
        alone.score_features(in_full)
    assert caplog.text.count("knn was made in bfloat16 and these features are in float32") == 1
    other.fit(in_full).save_pretrained(tmp_path / "again")
    assert Detector.from_pretrained(tmp_path / "again").backbone.dtype == torch.float32


def test_single_images_in_half_precision_are_warned_of(image_folder, caplog):
    one = ImageFolder(image_folder).subset([0])
    for dtype in ("float32", "bfloat16"):
        detector = create_detector("mcm", backbone=create_backbone("tiny", dtype=dtype), class_names=CLASSES)
        detector.score(one)
        detector.calibrate(image_folder).score(image_folder)
        assert not caplog.text
        for _ in range(2):
            detector.is_ood(one)
    assert caplog.text.count("decides on a single image in bfloat16") == 1


def test_knn_caps_a_small_bank_and_says_so(clustered, caplog):
    train = clustered()[:7]
    detector = create_detector("knn", k=9).fit(train)
    assert "more than the bank's 7 images" in caplog.text
    torch.testing.assert_close(
        detector.score_features(clustered(1)), functional.knn(clustered(1).image, train.image, k=7)
    )


def test_text_is_averaged_over_templates(small_backbone):
    templates = ["a photo of a {}", "{}."]
    detector = create_detector(
        "mcm", backbone=small_backbone, class_names=["dog", "great_white shark"], template=templates
    )
    each = [small_backbone.encode_text([t.format(n) for n in ("dog", "great white shark")]) for t in templates]
    torch.testing.assert_close(detector.state["text"], F.normalize(sum(each) / 2, dim=-1))
    assert detector.template == templates


# ---- class names


@pytest.mark.parametrize("kind", [tuple, np.array, pd.Series, pd.Index, iter])
def test_class_names_may_be_any_sequence_of_strings(kind, small_backbone, features):
    detector = create_detector("mcm", backbone=small_backbone, class_names=kind(CLASSES))
    assert detector.class_names == CLASSES
    assert all(type(name) is str for name in detector.class_names)
    listed = create_detector("mcm", backbone=small_backbone, class_names=CLASSES)
    assert torch.equal(detector.score_features(features), listed.score_features(features))


@pytest.mark.parametrize(
    ("names", "error", "sentence"),
    [
        ({"a": 1, "b": 2}, TypeError, "got a dict: list its values"),
        ({"a", "b"}, TypeError, "got set, which has no order"),
        (["a", None], TypeError, r"class_names\[1\] is None \(NoneType\), not a text: leave it out"),
        ([3, 4], TypeError, r"class_names\[0\] is 3 \(int\), not a text: write str\(3\)"),
        (np.array([["a", "b"]]), TypeError, "ndarray"),
        (np.array("a"), TypeError, "must be a list of names"),
        (7, TypeError, "got int"),
        (b"ab", TypeError, "got the string"),
        (["a", " "], UsageError, "Class name 1 of 2 is empty"),
        (["cat", "dog", "cat"], UsageError, "'cat' is given twice"),
        (["ring_tail", "dog", " ring  tail"], UsageError, r"'ring_tail' \(also written ' ring  tail'\) is given twice"),
        (["café", unicodedata.normalize("NFD", "café")], UsageError, "'café' is given twice"),
    ],
)
@pytest.mark.parametrize("name", ["mcm", "knn"])
def test_class_names_of_other_kinds_are_refused_in_a_sentence(name, names, error, sentence):
    with pytest.raises(error, match=sentence):
        create_detector(name, class_names=names)


def test_composed_and_decomposed_names_are_the_same_class(small_backbone, features):
    """As folders are named on macOS, on either side."""
    other = [unicodedata.normalize("NFD", f"é {name}") for name in CLASSES]
    composed = [unicodedata.normalize("NFC", name) for name in other]
    for given, labels in ((composed, other), (other, composed)):
        labelled = replace(features, label_names=labels)
        detector = create_detector("linear_probe", backbone=small_backbone, class_names=given).fit(labelled)
        right = (detector.predict(labelled) == labelled.labels).float().mean()
        assert len(right_predictions(detector, labelled)) == len(features)
        assert right_predictions(detector, labelled).float().mean() == right
        assert detector.class_names == composed
    texts = [create_detector("mcm", backbone=small_backbone, class_names=n).state["text"] for n in (other, composed)]
    assert torch.equal(*texts)


def test_labels_of_one_name_are_refused_where_they_name_the_classes(small_backbone, features):
    labelled = replace(features, label_names=["a b", "a_b", "c", "d"])
    with pytest.raises(UsageError, match=r"Labels: 'a b' \(also written 'a_b'\) is given twice"):
        create_detector("mahalanobis", backbone=small_backbone).fit(labelled)


SOFTMAX = ["mcm", "gl_mcm", "r_mcm", "msp", "gen", "linear_probe"]


@pytest.mark.parametrize("name", SOFTMAX)
def test_a_softmax_over_one_class_is_refused_from_the_start(name, small_backbone, features, tmp_path):
    sentence = rf"'{name}' needs at least two classes.*'knn' or 'mahalanobis'.*'max_logit'"
    with pytest.raises(UsageError, match=sentence):
        create_detector(name, backbone=small_backbone, class_names=["dog"])
    detector = create_detector(name, backbone=small_backbone, class_names=CLASSES).fit(features)
    detector.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"class_names": ["dog"]}))  # as earlier versions took it
    loaded = Detector.from_pretrained(tmp_path)
    for call in (loaded.score_features, loaded.predict, loaded.calibrate, loaded.is_ood):
        with pytest.raises(UsageError, match=sentence):
            call(features)
    with pytest.raises(UsageError, match=sentence):
        loaded.calibrate(torch.rand(40))


@pytest.mark.parametrize("name", ["msp", "gen"])
def test_a_classifier_of_one_class_is_refused(name, features):
    one = replace(features, logits=torch.randn(len(features), 1))
    with pytest.raises(UsageError, match="needs at least two classes, got 1"):
        create_detector(name, head="classifier").score_features(one)


def test_one_class_is_enough_for_cosines_and_distances(small_backbone, features):
    scores = create_detector("max_logit", backbone=small_backbone, class_names=["dog"]).score_features(features)
    assert scores.std() > 0
    one = replace(features, labels=torch.zeros(len(features), dtype=torch.int64), label_names=["dog"])
    for name in ("knn", "mahalanobis"):
        assert create_detector(name, backbone=small_backbone).fit(one).score_features(features).std() > 0


# ---- what may be given


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 8, 3), np.uint8),
        torch.zeros(2, 3, 8, 8),
        [np.zeros((8, 8, 3)), np.zeros((4, 8, 3))],
        ["a.png", "b.png"],
        {"a": 1.0},
        None,
        0.5,
        [],
    ],
)
def test_what_may_be_given_is_said(pixels, small_backbone, features):
    detector = create_detector("mcm", backbone=small_backbone, class_names=CLASSES).calibrate(torch.rand(30))
    for call in (detector.is_ood, detector.p_value, detector.calibrate):
        with pytest.raises((TypeError, ValueError), match=r"(?i)give scores .*FeatureSet, or images: .*a PIL image"):
            call(pixels)


@pytest.mark.parametrize("pixels", [np.zeros((8, 8, 3), np.uint8), torch.zeros(2, 3, 8, 8), [np.zeros((8, 8, 3))], 0.5])
def test_images_to_score_are_no_pixels(pixels, small_backbone, features):
    detector = create_detector("mcm", backbone=small_backbone, class_names=CLASSES)
    with pytest.raises(TypeError, match=r"(?i)images"):
        detector.score(pixels)
    with pytest.raises(TypeError, match="a FeatureSet, which score_features takes"):
        detector.score(features)


# ---- saved by others, and disks that are full


def test_another_schema_is_refused_by_version(small_backbone, tmp_path):
    create_detector("mcm", backbone=small_backbone, class_names=CLASSES).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"schema": 99}))
    with pytest.raises(DataError, match=r"has schema 99, and this version of ood-core reads schema 1: update it"):
        Detector.from_pretrained(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("(os error 28)")])
@pytest.mark.parametrize("name", ["mcm", "linear_probe"])
def test_a_full_disk_leaves_no_half_of_a_detector(error, name, small_backbone, features, tmp_path, monkeypatch):
    detector = create_detector(name, backbone=small_backbone, class_names=CLASSES).fit(features)
    detector.save_pretrained(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def full(*_):
        raise error

    monkeypatch.setattr("ood_core.detectors.storage.save_file", full)
    for folder in ("old", "new"):
        with pytest.raises(WriteError, match=r"model\.safetensors' cannot be written: the disk is full"):
            detector.save_pretrained(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk_while_features_are_kept(small_backbone, image_folder, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')

    monkeypatch.setattr("ood_core.features.save_file", full)
    with pytest.raises(WriteError, match="the disk is full"):
        extract(small_backbone, image_folder, {"image"}, cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert len(extract(small_backbone, image_folder, {"image"}, cache=tmp_path)) == 20


@pytest.fixture(scope="module")
def patch_classifier():
    """A small Swin whose head reads every cell."""
    from ood_core.backbones.timm import TimmBackbone
    from ood_core.backbones.transform import ImageTransform
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    torch.manual_seed(0)
    sizes = {"window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
    model = SwinTransformerV2(img_size=32, patch_size=4, num_classes=5, **sizes)
    torch.nn.init.normal_(model.head.fc.weight)
    return TimmBackbone(model, ImageTransform(crop=(32, 32), resize=32), spec="small-swin")


def test_gl_mcm_of_a_classifier_reads_its_head_on_image_and_cells(patch_classifier, tmp_path):
    network, images = patch_classifier.network, torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = network(images)
        x = network.layers[0](network.patch_embed(images))
        x = network.layers[1].blocks[0](network.layers[1].downsample(x))
        value = network.layers[1].blocks[1]
        at = 2 * 32
        v = x @ value.attn.qkv.weight[at:].T + (value.attn.v_bias if value.attn.qkv.bias is None else 0)
        u = x + value.norm1(value.attn.proj(v))
        cells = network.head.fc(network.norm(u + value.norm2(value.mlp(u)))).flatten(1, 2)
    found = patch_classifier.encode(images, {"logits", "local_logits"})
    torch.testing.assert_close(found["local_logits"], cells, rtol=1e-4, atol=1e-5)
    for temperature, weight in ((1.0, 1.0), (100.0, 0.5)):
        detector = create_detector("gl_mcm", backbone=patch_classifier, temperature=temperature, local_weight=weight)
        assert detector.head == "classifier"
        assert detector.fitted
        scores = detector.score_features(FeatureSet(ids=[str(i) for i in range(70)], **found))
        expected = (logits / temperature).softmax(-1).amax(-1)
        expected += weight * (cells / temperature).softmax(-1).amax((1, 2))
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    detector.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    features = FeatureSet(ids=["a", "b"], **{name: value[:2] for name, value in found.items()})
    assert torch.equal(loaded.score_features(features), scores[:2])
    assert loaded.predict(features) is None


def test_gl_mcm_without_texts_and_without_a_head_says_what_is_missing(patch_classifier, small_backbone):
    with pytest.raises(UsageError, match="has no 'logits'"):
        create_detector("gl_mcm", backbone=small_backbone, class_names=CLASSES, head="classifier")
    with pytest.raises(UsageError, match="has no 'text'"):
        create_detector("gl_mcm", backbone=patch_classifier, class_names=CLASSES, head="zero_shot")
    with pytest.raises(UsageError, match="has no 'logits'"):
        small_backbone.encode(torch.zeros(1, 3, 32, 32), {"local_logits"})


def test_gl_mcm_of_clear_logits_keeps_their_order(patch_classifier):
    """Float32 rounds all of these to 2."""
    detector = create_detector("gl_mcm", backbone=patch_classifier)
    margins = torch.tensor([50.0, 60.0, 80.0, 200.0])
    logits = torch.zeros(4, 5).index_put((torch.arange(4), torch.tensor(2)), margins)
    weak = logits[:, None].expand(4, 3, 5) / 2
    assert functional.gl_mcm_logits(logits, weak).unique().tolist() == [2.0]
    scores = detector.score_features(FeatureSet(ids=list("abcd"), logits=logits, local_logits=weak))
    assert scores.tolist() == sorted(set(scores.tolist()))


def test_images_are_fitted_on_as_their_features_are(small_backbone, image_folder, tmp_path):
    made = create_detector("knn", backbone=small_backbone, k=2).fit(image_folder, cache=tmp_path)
    read = create_detector("knn", backbone=small_backbone, k=2)
    features = extract(small_backbone, image_folder, read.needs)
    assert torch.equal(made.state["bank"], read.fit_features(features).state["bank"])
    assert torch.equal(made.score(image_folder), read.fit(features).score(image_folder))
    assert list(tmp_path.iterdir())
    for wrong in (3, None, torch.zeros(2, 4), []):
        with pytest.raises(TypeError, match=r"takes a FeatureSet .* or images"):
            made.fit(wrong)


def test_images_need_a_backbone_to_be_fitted_on(image_folder):
    with pytest.raises(UsageError, match="has no backbone to read images with"):
        create_detector("knn").fit(image_folder)


def test_leaves_are_told_once_with_the_way_to_them():
    first, second, third = (create_detector(name) for name in ("knn", "vim", "mahalanobis"))
    inner = Fusion({"a": first, "b": second})
    outer = Fusion({"inner": inner, "c": third, "again": first})
    assert list(leaves(outer).items()) == [(first, "inner > a"), (second, "inner > b"), (third, "c")]
    assert leaves(outer, second) == {first: "inner > a", second: "", third: "c"}
    assert leaves(second, outer)[second] == ""
