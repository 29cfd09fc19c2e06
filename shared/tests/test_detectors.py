"""Every detector: fitting, scoring, calibration, p-values, options, saving and loading; each against its equation."""

import json
from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_detector, detectors, functional, list_detectors
from ood_core.detectors import broken_detectors, detector_class
from ood_core.detectors.base import Detector
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.features import FeatureSet, extract
from ood_core.metrics import auroc
from PIL import Image

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
    found = {"broken": broken, "mcm": detectors._entry_points()["mcm"]}
    monkeypatch.setattr(detectors, "_entry_points", lambda: found)
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
    ready.calibrate(features)
    assert torch.equal(ready.is_ood(features), ready.score_features(features) < ready.threshold)
    assert ready.is_ood(features).dtype == torch.bool


def test_saved_and_loaded_is_the_same(ready, features, small_backbone, tmp_path):
    ready.calibrate(features)
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
    expected = LogisticRegression(C=10.0, max_iter=2000).fit(train.image.double().numpy(), train.labels.numpy())
    probability = expected.predict_proba(clustered(1).image.double().numpy()).max(1)
    np.testing.assert_allclose(detector.score_features(clustered(1)).numpy(), probability, rtol=1e-4)


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
