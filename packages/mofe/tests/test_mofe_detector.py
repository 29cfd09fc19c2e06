"""The detector: fitted on images, scored from features, saved and loaded, its mistakes said in sentences."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_backbone, create_detector, evaluate, extract, list_detectors
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import PILImages, scenes
from ood_core.detectors.base import Detector, right_predictions
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.features import FeatureSet
from ood_mofe import training
from ood_mofe.detectors import MoFE
from ood_mofe.partition import assign_groups, imagenet_edges, initial_groups, read_groups
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

SIDE = 16
NAMES = ["ant", "bee", "cat", "dog", "elk"]
QUICK = {"experts": 3, "epochs": 3, "batch_size": 8, "augment": False, "head_learning_rate": 0.1, "k": 3}
QUICK |= {"learning_rate": 1e-3, "seed": 1}
registered = pytest.mark.skipif("mofe" not in list_detectors(), reason="ood-mofe is only on the path: no registry")


def small_vit(*, seed=0, **options):
    options = {"num_classes": 0, "init_values": 1.0} | options
    model = VisionTransformer(SIDE, 8, embed_dim=16, depth=2, num_heads=2, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5)
        model.cls_token.zero_()  # what it becomes is then the images' alone
        model.pos_embed.zero_()
    transform = ImageTransform(crop=(SIDE, SIDE), resize=SIDE)
    return TimmBackbone(model.eval(), transform, spec="small-vit")


def photos(count=40, *, classes=5, seed=0, noise=40):
    """Noise around a colour of the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    colours = np.random.default_rng(7).integers(0, 256, (classes, 1, 1, 3))
    pixels = colours[labels] + rng.normal(0, noise, (count, SIDE, SIDE, 3))
    images = [Image.fromarray(one) for one in pixels.clip(0, 255).astype(np.uint8)]
    return PILImages(images, labels.tolist(), label_names=NAMES[:classes])


def made(backbone, **options):
    detector = MoFE(**(QUICK | options))
    detector.attach(backbone)
    return detector


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone():
    return small_vit()


@pytest.fixture(scope="module")
def source():
    return photos()


@pytest.fixture(scope="module")
def fitted(backbone, source):
    return made(backbone).fit(source)


@pytest.fixture(scope="module")
def features(fitted):
    return extract(fitted.backbone, photos(25, seed=5, noise=70), fitted.needs)


def changed(detector, **params):
    """A detector with other options that the fit does not depend on."""
    import copy

    return copy.copy(detector).set_params(**params)


# ---- from end to end


@registered
def test_scenes_on_the_embedded_backbone():
    def images(scenes):
        return PILImages([Image.fromarray(i) for i in scenes.images], scenes.labels, label_names=scenes.label_names)

    def textures(count):
        return [Image.fromarray(one) for one in scenes.textures(count, size=64, seed=0).images]

    names = scenes.ID_CLASSES[:4]
    train, test = (images(scenes.render(names, n, size=64, seed=seed)) for n, seed in ((6, 0), (4, 1)))
    backbone = create_backbone("tiny")
    options = dict(MoFE.demo_options) | {"experts": 2, "epochs": 1}
    both = {
        name: create_detector(name, backbone=backbone, **options) for name, options in (("mofe", options), ("knn", {}))
    }
    found = evaluate(both, id=test, ood={"textures": textures(16)}, fit=train)
    assert found.metrics["mofe"].mean.auroc > 0.9
    assert found.results["detectors"]["mofe"]["accuracy"] > 0.9
    fitted = both["mofe"]
    assert fitted.backbone.fingerprint != backbone.fingerprint
    assert both["knn"].backbone is backbone  # its features are those of the backbone as it was


def test_features_are_those_of_router_and_experts(backbone, fitted, features):
    source = photos(25, seed=5, noise=70)
    z = backbone.prefix(torch.stack([backbone.transform(image) for _, image in source]))
    state = {name.removeprefix("model."): value for name, value in fitted.state.items()}
    normed = F.layer_norm(z[:, 0], (16,), eps=1e-6)
    torch.testing.assert_close(features.extra["router"], normed @ state["router"], rtol=1e-5, atol=1e-5)
    experts = fitted._network(backbone, fitted.group)
    experts.load_state_dict({name: value for name, value in state.items() if name in experts.state_dict()})
    for image, expert in enumerate((normed @ state["router"]).argmax(1).tolist()):
        token = experts.experts.block(expert, z[image : image + 1])[:, 0]
        token = F.layer_norm(token, (16,), state["norm.weight"], state["norm.bias"], 1e-6)[0]
        torch.testing.assert_close(features.extra["token"][image], token, rtol=1e-4, atol=1e-4)
    trained = backbone.encode_image(torch.stack([backbone.transform(i) for _, i in source]), normalize=False)
    assert (features.extra["token"] - trained).abs().max() > 1e-3
    assert features.fingerprint == fitted._held.record["fingerprint"] != backbone.fingerprint


def test_the_bank_holds_the_training_images_by_their_routed_expert(backbone, fitted, source):
    rows = fitted.state["bank_row"]
    labels = torch.as_tensor(source.labels)
    expected, held = training.split_validation(labels, 0.1)
    assert sorted(rows.tolist()) == expected.tolist()
    assert len(held) == 5
    found = extract(fitted.backbone, source.subset(rows.numpy()), fitted.needs)
    assert torch.equal(fitted.state["bank_expert"], found.extra["router"].argmax(1))
    assert fitted.state["bank_expert"].diff().min() == 0  # sorted
    token = F.normalize(found.extra["token"], dim=1)
    torch.testing.assert_close(fitted.state["bank"], token, rtol=1e-5, atol=1e-6)
    # The router has learned whose classes are whose.
    assert (fitted.group[labels[rows]] == fitted.state["bank_expert"]).double().mean() > 0.8
    assert set(fitted.history[-1]) >= {"experts", "routing", "mixup", "reg", "validation_accuracy", "token_norm"}


# ---- scores


def logits_of(fitted, features):
    """Every output of the heads [N, C + E], written out."""
    token = features.extra["token"]
    return token @ fitted.state["model.readout.heads.weight"].T + fitted.state["model.readout.heads.bias"]


def others_of(fitted, features):
    """Probability of "others" in every expert's head, [N, E]."""
    every = logits_of(fitted, features)
    columns = [[*(fitted.group == e).nonzero()[:, 0].tolist(), 5 + e] for e in range(3)]
    return torch.stack([every[:, some].softmax(1)[:, -1] for some in columns], 1)


@pytest.mark.parametrize("k", [1, 4, 500])
@pytest.mark.parametrize("bank", ["expert", "global"])
def test_knn_is_the_distance_to_the_kth_of_the_experts_own_bank(fitted, features, bank, k):
    detector = changed(fitted, bank=bank, k=k)
    scores = detector.score_features(features)
    expert = features.extra["router"].argmax(1)
    assert len(expert.unique()) > 1
    for image, token in enumerate(F.normalize(features.extra["token"], dim=1)):
        entries = fitted.state["bank"]
        if bank == "expert":
            entries = entries[fitted.state["bank_expert"] == expert[image]]
        distances = (entries - token).norm(dim=1).sort().values
        assert scores[image].item() == pytest.approx(-distances[min(k, len(entries)) - 1].item(), abs=1e-5)
    assert ((scores >= -2) & (scores <= 0)).all()


def test_scores_depend_on_no_other_image_and_on_no_length(fitted, features):
    scores = fitted.score_features(features)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fitted.score_features(features[order]), scores[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.score_features(features[3:4]), scores[3:4], rtol=0, atol=1e-6)
    longer = features[:]
    longer.extra["token"] = 7 * features.extra["token"]
    torch.testing.assert_close(fitted.score_features(longer), scores, rtol=0, atol=1e-5)


def test_a_training_image_is_its_own_nearest_neighbour(fitted, source):
    found = extract(fitted.backbone, source.subset(fitted.state["bank_row"].numpy()), fitted.needs)
    assert changed(fitted, k=1).score_features(found).abs().max() < 1e-5


def test_an_expert_without_a_bank_gives_the_lowest_score(fitted, features, caplog):
    expert = features.extra["router"].argmax(1)
    lonely = int(expert.mode().values)
    detector = changed(fitted)
    keep = fitted.state["bank_expert"] != lonely
    detector.state = fitted.state | {name: fitted.state[name][keep] for name in ("bank", "bank_expert", "bank_row")}
    scores = detector.score_features(features)
    assert (scores[expert == lonely] == -2).all()
    others = expert != lonely
    torch.testing.assert_close(scores[others], fitted.score_features(features)[others])
    detector.set_params(scorer="energy")
    with caplog.at_level(logging.WARNING):
        detector.set_params(scorer="knn")
    first = NAMES[fitted.group.tolist().index(lonely)]
    assert any(f"expert {lonely} ({first}" in m and "holds 0 images" in m and "-2" in m for m in caplog.messages)


@pytest.mark.parametrize(("count", "classes", "expected"), [(40, 5, 7), (130, 2, 50)])
def test_no_k_is_that_of_the_cores_knn(backbone, count, classes, expected):
    source = photos(count, classes=classes)
    detector = made(backbone, k=None, experts=2, epochs=1, mixup=False)
    assert detector.neighbour == 50  # nothing is known yet
    detector.fit(source)
    known = source.subset(detector.state["bank_row"].numpy())
    core = create_detector("knn").fit(extract(backbone, known, {"image"}))
    assert detector.neighbour == int(core.state["k"]) == expected  # a tenth of a class, at least one, is held out
    features = extract(detector.backbone, photos(6, classes=classes, seed=3), detector.needs)
    fixed = changed(detector, k=expected)
    assert torch.equal(detector.score_features(features), fixed.score_features(features))
    assert changed(fixed, k=None).neighbour == expected


def test_a_small_bank_is_named_and_uses_what_it_has(fitted, caplog):
    with caplog.at_level(logging.WARNING):
        changed(fitted, k=1000)
    sizes = torch.bincount(fitted.state["bank_expert"]).tolist()
    for expert, size in enumerate(sizes):
        assert any(f"expert {expert} (" in m and f"holds {size} images" in m and "k=1000" in m for m in caplog.messages)
    caplog.clear()
    changed(fitted, k=2)
    changed(fitted, k=1000, scorer="energy")
    assert not caplog.messages
    detector = changed(fitted, k=1000, bank="global")
    assert len(caplog.messages) == 1
    detector.set_params(k=2000)
    detector.set_params(head="global")
    assert len(caplog.messages) == 1  # said before


def test_scores_on_logits_are_those_of_the_global_head(fitted, features):
    weight, bias = (fitted.state[f"model.readout.global_head.{name}"] for name in ("weight", "bias"))
    logits = features.extra["token"] @ weight.T + bias
    expected = {"msp": logits.softmax(1).amax(1), "max_logit": logits.amax(1), "energy": logits.logsumexp(1)}
    for scorer, values in expected.items():
        torch.testing.assert_close(changed(fitted, scorer=scorer).score_features(features), values)
    assert torch.equal(changed(fitted, head="global").predict(features), logits.argmax(1))


def test_scores_on_others(fitted, features):
    others = others_of(fitted, features)
    expert = features.extra["router"].argmax(1)
    routed = others[torch.arange(len(others)), expert]
    for scorer in ("others", "atd"):  # CLIPN's score without its texts
        torch.testing.assert_close(changed(fitted, scorer=scorer).score_features(features), 1 - routed)
    torch.testing.assert_close(changed(fitted, scorer="mos").score_features(features), (-others).amax(1))


def test_the_class_is_the_best_of_the_experts_own(fitted, features):
    every = logits_of(fitted, features)
    expert = features.extra["router"].argmax(1)
    for image, predicted in enumerate(fitted.predict(features).tolist()):
        own = (fitted.group == expert[image]).nonzero()[:, 0]
        assert predicted == own[every[image, own].argmax()]
    assert right_predictions(fitted, features).double().mean() > 0.5


def test_without_mixup_the_logits_are_the_experts(backbone, source):
    detector = made(backbone, mixup=False, scorer="energy").fit(source)
    found = extract(detector.backbone, photos(9, seed=5), detector.needs)
    every, expert = logits_of(detector, found), found.extra["router"].argmax(1)
    own = every[:, :5].masked_fill(detector.group != expert[:, None], -math.inf)
    torch.testing.assert_close(detector.score_features(found), own.logsumexp(1))
    assert set(detector.history[0]) & {"mixup", "reg"} == set()


def test_a_shared_block_with_a_head_per_group(backbone, source):
    detector = made(backbone, moe=False, group_heads=True, mixup=False, scorer="mos").fit(source)
    assert len(detector.state["model.experts.norm1_weight"]) == 1
    found = extract(detector.backbone, photos(25, seed=5), detector.needs)
    others = others_of(detector, found)
    torch.testing.assert_close(detector.score_features(found), (-others).amax(1))
    every = logits_of(detector, found)
    shares = torch.zeros(25, 5)
    for e in range(3):
        own = (detector.group == e).nonzero()[:, 0]
        shares[:, own] = every[:, [*own.tolist(), 5 + e]].softmax(1)[:, :-1]
    assert torch.equal(detector.predict(found), shares.argmax(1))
    assert right_predictions(detector, found).double().mean() > 0.5
    torch.testing.assert_close(changed(detector, scorer="energy").score_features(found).exp(), shares.sum(1))


def test_naive_fine_tuning(backbone, source):
    detector = made(backbone, moe=False, mixup=False, scorer="max_logit").fit(source)
    assert "model.readout.heads.weight" not in detector.state
    assert next(iter(detector.history[0])) == "classes"
    found = extract(detector.backbone, photos(25, seed=5), detector.needs)
    weight, bias = (detector.state[f"model.readout.global_head.{name}"] for name in ("weight", "bias"))
    logits = found.extra["token"] @ weight.T + bias
    torch.testing.assert_close(detector.score_features(found), logits.amax(1))
    assert torch.equal(detector.predict(found), logits.argmax(1))
    scores = changed(detector, scorer="knn").score_features(found)
    assert torch.equal(scores, changed(detector, scorer="knn", bank="global").score_features(found))


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "renorm", "top_k": 2},
        {"tokens": "all"},
        {"router_norm": "none"},
        {"router_reads": "patches"},
        {"expert_layers": 2},
        {"unfreeze_blocks": 1},
    ],
)
def test_switches_of_the_network_stay_with_the_detector(backbone, source, tmp_path, options):
    detector = made(backbone, **options).fit(source)
    plain = made(backbone).fit(source)
    assert detector.backbone.fingerprint != plain.backbone.fingerprint
    detector.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path, backbone=backbone)
    images = photos(9, seed=5)
    torch.testing.assert_close(loaded.score(images), detector.score(images))
    if options == {"tokens": "all"}:
        torch.testing.assert_close(detector.score(images), plain.score(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"expert_layers": 2}, {"unfreeze_blocks": 1}])
def test_before_any_step_features_are_the_backbones_own(backbone, source, monkeypatch, options):
    monkeypatch.setattr("ood_mofe.detectors.train_network", lambda *_, **__: [])
    detector = made(backbone, **options).fit(source)
    images = photos(9, seed=5)
    token = extract(detector.backbone, images, detector.needs).extra["token"]
    expected = extract(backbone, images, {"image"}).image
    torch.testing.assert_close(F.normalize(token, dim=1), expected, rtol=1e-4, atol=1e-5)


# ---- CLIPN's texts


@pytest.fixture(scope="module")
def clip_fitted():
    names = scenes.ID_CLASSES[:3]
    rendered = scenes.render(names, 4, size=64, seed=0)
    images = PILImages([Image.fromarray(i) for i in rendered.images], rendered.labels, label_names=names)
    options = {"experts": 2, "epochs": 1, "mixup": False, "batch_size": 12, "k": 1}
    detector = made(create_backbone("tiny"), **options).fit(images)
    return detector, extract(detector.backbone, images, detector.needs | {"image"})


def write_texts(path, classes=3, width=192, **changes):
    yes, no = torch.randn(2, classes, width, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(path, **({"yes": yes, "no": no} | changes))
    return yes, no


def test_agreeing_to_differ_with_texts_from_a_file(clip_fitted, tmp_path):
    detector, features = clip_fitted
    yes, no = (F.normalize(torch.from_numpy(one), dim=1) for one in write_texts(tmp_path / "clipn.npz"))
    visual = detector.backbone.model.visual
    image = F.normalize(features.extra["token"] @ visual.proj, dim=1)
    assert F.cosine_similarity(image, features.image).min() > 0.9  # one step from the backbone's own embedding
    scale = detector.backbone.logit_scale
    assert scale < 50  # not the 100 of published models
    logits = scale * image @ yes.T
    says_yes = (logits - scale * image @ no.T).sigmoid()
    scored = changed(detector, scorer="atd", texts=tmp_path / "clipn.npz")
    expected = (says_yes * logits.softmax(1)).sum(1)
    torch.testing.assert_close(scored.score_features(features), expected, rtol=1e-4, atol=1e-5)
    best = logits.argmax(1)
    competing = changed(scored, scorer="ctw").score_features(features)
    torch.testing.assert_close(competing, says_yes[torch.arange(12), best], rtol=1e-4, atol=1e-5)
    scored.save_pretrained(tmp_path / "saved")
    (tmp_path / "clipn.npz").unlink()  # they are saved with the detector
    loaded = Detector.from_pretrained(tmp_path / "saved", backbone=detector.backbone)
    torch.testing.assert_close(loaded.score_features(features), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.set_params(k=2).score_features(features), expected, rtol=1e-4, atol=1e-5)
    without = changed(loaded, texts=None).score_features(features)
    torch.testing.assert_close(without, changed(detector, scorer="others").score_features(features))
    assert "yes" not in detector.state


# ---- texts as heads


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny")


def rendered(count, seed):
    names = scenes.ID_CLASSES[:4]
    found = scenes.render(names, count, size=64, seed=seed)
    return PILImages([Image.fromarray(i) for i in found.images], found.labels, label_names=names)


TEXT = {"classifier": "text", "experts": 2, "epochs": 1, "batch_size": 16, "k": 1, "learning_rate": 1e-4}


def test_without_a_step_texts_predict_what_zero_shot_classification_does(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("ood_mofe.detectors.train_network", lambda *_, **__: [])
    detector = made(tiny, **TEXT).fit(rendered(3, seed=0))
    images = rendered(5, seed=1)
    features = extract(detector.backbone, images, detector.needs | {"image"})
    mcm = create_detector("mcm", backbone=tiny, class_names=detector.class_names)
    assert torch.equal(detector.predict(features), mcm.predict(extract(tiny, images, {"image"})))
    texts = tiny.encode_text([f"a photo of a {name}" for name in detector.class_names])
    logits = tiny.logit_scale * features.image @ texts.T
    torch.testing.assert_close(
        changed(detector, scorer="max_logit").score_features(features), logits.amax(1), rtol=1e-4, atol=1e-3
    )
    expert = features.extra["router"].argmax(1)
    within = changed(detector, head="expert").predict(features)
    assert torch.equal(detector.group[within], expert)
    others = changed(detector, scorer="others").score_features(features)
    for image, e in enumerate(expert.tolist()):
        own = detector.group == e
        against = -tiny.logit_scale * features.image[image] @ texts[own].mean(0)
        log_p = torch.cat([logits[image, own], against[None]]).log_softmax(0)[-1]
        expected = 1 - log_p.exp() if log_p > math.log(2**-10) else 1 - 2**-10 * (1 + log_p + math.log(2**10))
        assert others[image].item() == pytest.approx(expected.item(), abs=1e-4)
    detector.save_pretrained(tmp_path)
    chances = extract(tiny, images, {"image"})
    confidence = mcm.set_params(temperature=1 / tiny.logit_scale).score_features(chances)
    ours = changed(detector, scorer="msp").score_features(features)
    torch.testing.assert_close(ours, confidence, rtol=1e-4, atol=1e-4)
    loaded = Detector.from_pretrained(tmp_path, backbone=tiny)
    assert torch.equal(loaded.score(images), detector.score(images))
    assert torch.equal(loaded.predict(features), detector.predict(features))


def test_text_heads_saved_without_a_scale_keep_clips(tiny, monkeypatch):
    monkeypatch.setattr("ood_mofe.detectors.train_network", lambda *_, **__: [])
    detector = made(tiny, **TEXT).fit(rendered(3, seed=0))
    features = extract(detector.backbone, rendered(2, seed=1), detector.needs)
    logits = changed(detector, scorer="max_logit").score_features(features)
    old = changed(detector, scorer="max_logit")
    old.state = {name: value for name, value in detector.state.items() if not name.endswith("logit_scale")}
    torch.testing.assert_close(old.score_features(features), logits * 100 / tiny.logit_scale)
    network = old.network()
    assert float(network.readout.global_head.logit_scale) == float(network.readout.heads.logit_scale) == 100


def test_training_leaves_the_texts_as_they_are(tiny):
    detector = made(tiny, **TEXT, mixup=False).fit(rendered(3, seed=0))
    texts = tiny.encode_text([f"a photo of a {name}" for name in detector.class_names])
    for head in ("heads", "global_head"):
        torch.testing.assert_close(detector.state[f"model.readout.{head}.weight"], texts, rtol=0, atol=1e-6)
    start = torch.stack([-texts[detector.group == g].mean(0) for g in range(2)])
    moved = (detector.state["model.readout.heads.others_weight"] - start).abs().max()
    assert 1e-4 < moved < 1
    assert "experts" in detector.history[0]


def test_clipns_texts_take_the_place_of_the_class_names(tiny, tmp_path):
    yes, _ = write_texts(tmp_path / "clipn.npz", classes=4)
    options = TEXT | {"texts": tmp_path / "clipn.npz", "mixup": False}
    file = tmp_path / "checkpoint.safetensors"
    detector = made(tiny, **options).fit(rendered(3, seed=0), checkpoint=file)
    expected = F.normalize(torch.from_numpy(yes), dim=1)
    torch.testing.assert_close(detector.state["model.readout.heads.weight"], expected)
    write_texts(tmp_path / "clipn.npz", classes=4, yes=-yes)
    with pytest.raises(UsageError, match=r"other settings \(texts\)"):
        made(tiny, **options).fit(rendered(3, seed=0), checkpoint=file)
    detector.set_params(texts=None)  # what it was trained with
    assert not detector.fitted


def test_ids_of_imagenet_are_read_as_words(tiny):
    detector = made(tiny, **TEXT, class_names=["n01440764", "n02099601", "ant"])
    texts = tiny.encode_text(["a photo of a tench", "a photo of a Golden Retriever", "a photo of a ant"])
    torch.testing.assert_close(detector._class_rows(tiny), texts)


def test_texts_as_heads_need_a_text_tower(backbone, fitted):
    with pytest.raises(UsageError, match="has no 'text'"):
        made(backbone, classifier="text")
    with pytest.raises(UsageError, match="has no 'text'"):
        changed(fitted, classifier="text")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"yes": np.zeros((4, 192), np.float32)}, r"'yes'.*\[4, 192\], not finite \[3, 192\]"),
        ({"no": np.full((3, 192), np.nan, np.float32)}, "'no'.*not finite"),
        ({"yes": np.array([{}], dtype=object)}, "no arrays 'yes' and 'no'.*allow_pickle=False"),
    ],
)
def test_text_files_that_do_not_fit(clip_fitted, tmp_path, changes, words):
    write_texts(tmp_path / "clipn.npz", **changes)
    with pytest.raises(DataError, match=words):
        changed(clip_fitted[0], scorer="atd", texts=tmp_path / "clipn.npz")


def test_text_files_that_are_none(clip_fitted, fitted, tmp_path):
    with pytest.raises(MissingDataError, match=r"no file .*none\.npz"):
        changed(clip_fitted[0], scorer="atd", texts=tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("yes")
    with pytest.raises(DataError, match="no arrays 'yes' and 'no'"):
        changed(clip_fitted[0], scorer="atd", texts=tmp_path / "text.npz")
    with pytest.raises(MissingDataError, match="no file"):  # before anything is trained
        made(create_backbone("tiny"), texts=tmp_path / "none.npz", experts=2).fit(photos(6, classes=3))
    with pytest.raises(UsageError, match="CLIP backbones"):
        changed(fitted, scorer="atd", texts=tmp_path / "text.npz")


# ---- storage and options


def test_saved_and_loaded(backbone, fitted, features, tmp_path, monkeypatch):
    detector = changed(fitted).calibrate(fitted.score_features(features))
    detector.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    assert isinstance(loaded, MoFE)
    assert torch.equal(loaded.score_features(features), detector.score_features(features))  # no backbone is needed
    assert torch.equal(loaded.predict(features), detector.predict(features))
    assert loaded.history == detector.history
    assert loaded.threshold == detector.threshold
    for given in (backbone, detector.backbone):  # as it was, or with an earlier fit's experts
        again = Detector.from_pretrained(tmp_path, backbone=given)
        assert again.backbone.fingerprint == features.fingerprint
        assert torch.equal(again.score(photos(9, seed=5)), detector.score(photos(9, seed=5)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone"]["spec"] == "small-vit"
    assert config["params"]["experts"] == 3
    monkeypatch.setattr("ood_core.detectors.held.create_backbone", lambda spec, dtype: backbone)
    assert torch.equal(loaded.score(photos(9, seed=5)), detector.score(photos(9, seed=5)))


@pytest.mark.parametrize("other", [{"seed": 1}, {"embed_dim": 8}, {"depth": 3}], ids=["weights", "width", "depth"])
def test_another_backbone_is_refused(fitted, tmp_path, other):
    fitted.save_pretrained(tmp_path)
    model = dict(other)
    if "seed" in other:
        another = small_vit(seed=1)
    else:
        options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0, "init_values": 1.0} | model
        another = TimmBackbone(VisionTransformer(SIDE, 8, **options), small_vit().transform, spec="other-vit")
    with pytest.raises(UsageError, match=r"was made with backbone 'small-vit' .* Fit it again"):
        Detector.from_pretrained(tmp_path, backbone=another)


def test_an_option_of_the_fit_takes_back_the_backbone(backbone, source, tmp_path):
    detector = made(backbone).fit(source)
    detector.save_pretrained(tmp_path)
    detector.set_params(k=2, bank="global")
    assert detector.fitted
    detector.set_params(epochs=1)
    assert not detector.fitted
    assert detector.backbone.fingerprint == backbone.fingerprint
    with pytest.raises(NotFittedError, match="call fit\\(images\\)"):
        detector.score(photos(3))
    detector.fit(source)
    assert detector.fitted
    assert detector.backbone.fingerprint != backbone.fingerprint
    loaded = Detector.from_pretrained(tmp_path).set_params(epochs=1)  # whose backbone has not been loaded
    loaded.attach(backbone)
    assert loaded.backbone.fingerprint == backbone.fingerprint


def test_fitting_twice_gives_the_same_and_starts_from_the_backbone(backbone, source):
    detector = made(backbone).fit(source)
    first = dict(detector.state)
    state = torch.get_rng_state()
    detector.fit(source)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.items():
        assert torch.equal(detector.state[name], value), name
    other = made(backbone, seed=2).fit(source)
    assert not torch.equal(other.state["model.router"], first["model.router"])


def test_a_checkpoint_of_other_options_is_refused(backbone, source, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    first = made(backbone).fit(source, checkpoint=file, cache=tmp_path / "cache")
    again = made(backbone, k=7, cache_limit=0).fit(source, checkpoint=file, cache=tmp_path / "cache")
    assert torch.equal(again.state["bank"], first.state["bank"])
    with pytest.raises(UsageError, match="other settings \\(reg_weight\\)"):
        made(backbone, reg_weight=0.2).fit(source, checkpoint=file)


def test_a_checkpoint_of_other_groups_is_refused_though_their_file_has_the_same_name(backbone, source, tmp_path):
    groups, file = tmp_path / "groups.csv", tmp_path / "checkpoint.safetensors"
    groups.write_text("".join(f"{name},{number % 3}\n" for number, name in enumerate(NAMES)))
    made(backbone, groups=groups).fit(source, checkpoint=file)
    groups.write_text("class,group\n" + groups.read_text())  # says the same
    made(backbone, groups=groups).fit(source, checkpoint=file)
    groups.write_text("".join(f"{name},{number // 2}\n" for number, name in enumerate(NAMES)))
    with pytest.raises(UsageError, match=r"other settings \(groups\)"):
        made(backbone, groups=groups).fit(source, checkpoint=file)


# ---- groups


WNIDS = ["n01440764", "n01443537", "n02979186", "n03000684", "n03417042"]


class TestGroups:
    def test_in_meaning_or_in_features_or_both(self):
        # Two fishes and three things; in feature space the last of the things is with the fishes.
        prototypes = torch.tensor([[0.0], [1.0], [9.0], [8.0], [0.5]])
        assert assign_groups(WNIDS, prototypes, 2, grouping="wordnet").tolist() == [0, 0, 1, 1, 1]
        assert assign_groups(WNIDS, prototypes, 2, grouping="both").tolist() == [0, 0, 1, 1, 0]
        assert assign_groups(WNIDS, prototypes, 2).tolist() == [0, 0, 1, 1, 0]
        assert assign_groups(NAMES, prototypes, 2).tolist() == [0, 0, 1, 1, 0]

    def test_given_by_a_mapping_or_a_file(self, tmp_path):
        prototypes = torch.tensor([[0.0], [1.0], [9.0], [8.0], [0.5]])
        groups = {"ant": "b", "bee": "b", "cat": "a", "dog": "a", "elk": "a"}
        file = tmp_path / "groups.csv"
        file.write_text("class,group\n" + "".join(f"{name},{group}\n" for name, group in groups.items()))
        for given in (groups, file, str(file)):
            assert assign_groups(NAMES, prototypes, 2, groups=given).tolist() == [1, 1, 0, 0, 0]
            assert assign_groups(NAMES, prototypes, 2, groups=given, grouping="both").tolist() == [1, 1, 0, 0, 1]
        file.write_text("elk,3\n")
        assert read_groups(file) == {"elk": "3"}

    def test_the_whole_of_imagenet(self):
        edges = imagenet_edges()
        classes = sorted({child for _, child in edges} - {parent for parent, _ in edges})
        assert len(classes) == 1000
        for count, sizes in ((7, [95, 121, 125, 132, 157, 163, 207]), (2, [485, 515])):
            group, refined = initial_groups(classes, count)
            assert refined
            assert sorted(torch.bincount(group).tolist()) == sizes

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"groups": {"ant": 0, "yak": 1}}, DataError, "1 unknown classes, first 'yak'"),
            ({"groups": {"ant": 0, "bee": 1}}, DataError, "leaves out 3 classes, first 'cat'"),
            ({"groups": dict.fromkeys(NAMES, 0)}, UsageError, "holds 1 groups for 3 experts: pass experts=1"),
            ({"groups": "none.csv"}, MissingDataError, "no file 'none.csv'"),
            ({"groups": {"ant": 0}, "grouping": "clustering"}, UsageError, "not used by grouping='clustering'"),
            ({"grouping": "wordnet"}, DataError, "first 'ant': pass groups= or grouping='clustering'"),
            ({"grouping": "given"}, UsageError, "needs groups="),
            ({"experts": 6}, UsageError, "6 experts are more than the 5 classes: pass experts=5"),
        ],
    )
    def test_that_cannot_be(self, backbone, source, monkeypatch, options, error, words):
        monkeypatch.setattr("ood_mofe.detectors.survey", None)  # said before anything is computed
        with pytest.raises(error, match=words):
            made(backbone, **options).fit(source)

    def test_a_file_of_another_kind(self, tmp_path):
        file = tmp_path / "groups.csv"
        for text in ("ant\n", "ant,1\nant,2\n", "ant,1,2\n"):
            file.write_text(text)
            with pytest.raises(DataError, match="one row 'class,group' per class"):
                read_groups(file)


# ---- bad input


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"scorer": "mcm"}, "scorer='mcm'"),
            ({"bank": "local"}, "bank='local'"),
            ({"head": "best"}, "head='best'"),
            ({"grouping": "mos8"}, "grouping='mos8'"),
            ({"reg": "l1"}, "reg='l1'"),
            ({"reg_on": "norm"}, "reg_on='norm'"),
            ({"experts": 0}, "experts=0"),
            ({"epochs": 0}, "epochs=0"),
            ({"k": 0}, "k=0"),
            ({"top_k": 4}, r"top_k=4 is outside \[1, 3\]"),
            ({"learning_rate": 0.0}, "learning_rate=0.0"),
            ({"reg_weight": -1}, "reg_weight=-1"),
            ({"validation": 1.0}, "validation=1.0"),
            ({"validation": 0}, "validation=0 leaves no images.*dynamic=False"),
            ({"smoothing": 1.0}, "smoothing=1.0"),
            ({"crop_scale": 0}, "crop_scale=0"),
            ({"group_heads": True}, "moe=False"),
            ({"mixup": False, "head": "global"}, "mixup=True"),
            ({"moe": False, "head": "expert"}, "group_heads=True"),
            ({"moe": False, "scorer": "others"}, "scorer='mos'"),
            ({"moe": False, "scorer": "mos"}, "group_heads=True"),
            ({"scorer": "ctw"}, "texts="),
            ({"top_k": 2}, "gate='renorm'"),
            ({"classifier": "texts"}, "classifier='texts'"),
            ({"router_reads": "all"}, "router_reads='all'"),
            ({"router_norm": "batch"}, "router_norm='batch'"),
            ({"gate": "soft"}, "gate='soft'"),
            ({"tokens": "some"}, "tokens='some'"),
            ({"expert_layers": 0}, "expert_layers=0"),
            ({"unfreeze_blocks": -1}, "unfreeze_blocks=-1"),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises(ValueError, match=words):
            MoFE(**(QUICK | options))

    @pytest.mark.parametrize("options", [{"expert_layers": 3}, {"unfreeze_blocks": 2}])
    def test_more_blocks_than_there_are(self, backbone, fitted, options):
        with pytest.raises(UsageError, match="are 3 blocks, and 'small-vit' has 2: pass fewer"):
            made(backbone, **options)
        with pytest.raises(UsageError, match="are 3 blocks"):
            changed(fitted, **options)

    def test_a_backbone_without_a_class_token(self):
        with pytest.raises(UsageError, match="class token"):
            made(small_vit(global_pool="avg"))

    def test_features_instead_of_images(self, backbone):
        with pytest.raises(UsageError, match="on images, not on features"):
            made(backbone).fit(FeatureSet(ids=["a"], image=torch.eye(1)))

    def test_no_backbone(self, source):
        with pytest.raises(UsageError, match="has no backbone"):
            MoFE().fit(source)

    def test_a_class_without_images(self, backbone, source):
        with pytest.raises(DataError, match=r"Classes \['yak'\] have no images"):
            made(backbone, class_names=[*NAMES, "yak"]).fit(source)

    def test_one_class(self, backbone):
        with pytest.raises(UsageError, match="at least two classes"):
            made(backbone, experts=1).fit(photos(4, classes=1))

    def test_no_labels(self, backbone):
        with pytest.raises(DataError, match="no labels"):
            made(backbone).fit(PILImages([Image.new("RGB", (16, 16))]))

    def test_a_router_that_is_not_a_number(self, fitted, features):
        broken = features[:]
        broken.extra["router"] = features.extra["router"].clone()
        broken.extra["router"][3, 1] = math.nan
        for call in (fitted.score_features, fitted.predict):
            with pytest.raises(DataError, match=r"has diverged.*lower learning_rate"):
                call(broken)

    def test_features_of_another_backbone(self, backbone, fitted, source):
        plain = extract(backbone, source, {"image"})
        with pytest.raises(UsageError, match="'router'"):
            fitted.score_features(plain)
        with pytest.raises(NotFittedError):
            made(backbone).score_features(plain)
        other = made(backbone, seed=3).fit(source)
        with pytest.raises(UsageError, match="Extract them again"):
            fitted.score_features(extract(other.backbone, source, other.needs))
