"""The detector: a search, and then another detector's scores on the edited backbone."""

import shutil

import pytest
import torch
from ood_core import create_backbone, create_detector, evaluate, extract
from ood_core.detectors import list_detectors
from ood_core.detectors.base import Detector
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.evaluation import fit_detectors
from ood_setar.detectors import SeTAR
from ood_setar.edit import SeTAREdit
from ood_setar.finetune import finetune
from ood_setar.search import search

LABELS = ["eel", "cat", "bee", "dog", "cat", "eel", "bee"]
CLASSES = ["bee", "cat", "dog", "eel"]
SEARCH = {"ratios": [0.1, 0.25, 0.4], "seed": 3}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        "setar" not in list_detectors(), reason="ood-setar is not installed, only on the path: no registry entry"
    ),
]


@pytest.fixture(scope="module")
def clip(make):
    return make.clip()


@pytest.fixture(scope="module")
def vit(make):
    return make.vit(seed=1)


@pytest.fixture(scope="module")
def train(make):
    return make.photos(LABELS)


@pytest.fixture(scope="module")
def test(make):
    return make.photos(CLASSES * 6, seed=1)


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny")


def setar(backbone, class_names=CLASSES, **options):
    return create_detector("setar", backbone=backbone, class_names=class_names, **SEARCH | {"cells_k": 2} | options)


def searched(backbone, images):
    """What `setar(backbone)` is to find."""
    return search(backbone, images, class_names=CLASSES, k=2, progress=False, **SEARCH)


@pytest.fixture(scope="module")
def fitted(clip, train):
    """Not to be changed."""
    return setar(clip).fit(train)


@pytest.fixture(scope="module")
def saved(tiny, train, test, tmp_path_factory):
    """A calibrated detector of a backbone that anyone can load, its folder, and the scores of `test`."""
    folder = tmp_path_factory.mktemp("saved") / "detector"
    made = setar(tiny, scorer="gl_mcm").fit(train).calibrate(test, tpr=0.8)
    made.save_pretrained(folder)
    return made, folder, made.score(test)


def weights(backbone):
    return {name: value.clone() for name, value in backbone.model.state_dict().items()}


def assert_equal_weights(first, second):
    assert all(torch.equal(*pair) for pair in zip(weights(first).values(), weights(second).values(), strict=True))


# ---- fitting


def test_fit_is_the_search_and_leaves_the_backbone_alone(clip, train, fitted):
    before, fingerprint = weights(clip), clip.fingerprint
    made = setar(clip)
    assert not made.fitted
    assert made.fit(train) is made
    expected = searched(clip, train)
    assert any(expected.ratios.values())
    assert made.edit.ratios == expected.ratios
    assert made.edit.record["search"] == expected.record["search"]
    assert made.fitted
    assert clip.fingerprint == fingerprint
    assert all(torch.equal(value, before[name]) for name, value in weights(clip).items())
    assert_equal_weights(made.backbone, expected.apply(clip))


def test_options_reach_the_search(clip, train, tmp_path):
    options = {"kind": "down", "drop": "principal", "ood_weight": 0.4, "cells_k": 3}
    made = setar(clip, **options, scorer="energy").fit(train, log_file=tmp_path / "log")
    settings = made.edit.record["search"]
    assert (settings["kind"], settings["drop"], settings["seed"]) == ("down", "principal", 3)
    assert (settings["objective"]["weight"], settings["objective"]["k"]) == (0.4, 3)
    assert settings["ratios"] == [0.0, 0.1, 0.25, 0.4]
    assert settings["template"] == "a photo of a {}"
    assert len((tmp_path / "log").read_text().splitlines()) == 1 + 4 + 3 + 3 + 3
    assert made.get_params().items() >= {**SEARCH, **options}.items()


def test_class_names_are_those_of_the_labels_unless_given(clip, train):
    assert setar(clip, None).fit(train).class_names == CLASSES
    more = ["gnu", *CLASSES]
    made = setar(clip, more).fit(train)
    assert made.class_names == more
    assert made.predict(extract(made.backbone, train, {"image"})).max() < 5


def test_a_template_is_searched_with_and_scored_with(clip, train, test):
    made = setar(clip, template="{}!").fit(train)
    assert made.edit.record["search"]["template"] == "{}!"
    inner = create_detector("mcm", backbone=made.backbone, class_names=CLASSES, template="{}!")
    assert torch.equal(made.score(test), inner.score(test))
    several = setar(clip, template=["{}", "a {}"])
    with pytest.raises(UsageError, match="one template, got 2"):
        several.fit(train)


def test_features_cannot_be_fitted_on(clip, train, tmp_path):
    features = extract(clip, train)
    with pytest.raises(UsageError, match="fit it on images"):
        setar(clip).fit(features)
    for run in (
        lambda: evaluate(setar(clip), id=features, ood={"far": features}, fit=features),
        lambda: fit_detectors({"setar": setar(clip), "knn": create_detector("knn", k=1)}, features),
    ):
        with pytest.raises(UsageError, match="'setar' is fitted on images, not on features"):
            run()


def test_what_cannot_be_fitted(clip, make, train):
    with pytest.raises(UsageError, match="no backbone"):
        create_detector("setar", class_names=CLASSES).fit(train)
    with pytest.raises(DataError, match=r"'eel'.*not among the 2 classes"):
        setar(clip, ["bee", "cat"]).fit(train)
    with pytest.raises(DataError, match="have no labels"):
        setar(clip).fit(make.photos([-1, -1]))
    with pytest.raises(UsageError, match="'small-vit' has no 'text'"):
        setar(make.vit())  # its score, MCM, reads texts
    with pytest.raises(UsageError, match="edited already"):
        setar(SeTAREdit({"visual.1.up": 0.2}).apply(clip)).fit(train)
    with pytest.raises(NotFittedError, match="one labelled ID image per class"):
        setar(clip).score(train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scorer": "mmc"}, "Did you mean 'mcm'"),
        ({"finetune_epochs": -1}, "finetune_epochs=-1"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"ratio": [0.1]}, "option of 'setar' 'ratio'.*'ratios'"),
        ({"drop": "random", "finetune_epochs": 1}, "[Oo]nly minor directions are trained"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        create_detector("setar", class_names=CLASSES, **options)


# ---- scores


@pytest.mark.parametrize(
    ("scorer", "kind", "needs"),
    [
        ("mcm", "clip", {"image"}),
        ("gl_mcm", "clip", {"image", "local"}),
        ("r_mcm", "clip", {"image", "local"}),
        ("energy", "clip", {"image"}),
        ("msp", "vit", {"logits"}),
        ("energy", "vit", {"logits"}),
    ],
)
@pytest.mark.parametrize("names", [CLASSES, None], ids=["named", "from-labels"])
def test_scores_are_the_inner_detectors_on_the_edited_backbone(request, train, test, scorer, kind, needs, names):
    backbone = request.getfixturevalue(kind)
    made = setar(backbone, names, scorer=scorer).fit(train)
    assert any(made.edit.ratios.values())
    edited = made.edit.apply(backbone)
    inner = create_detector(scorer, backbone=edited, class_names=CLASSES)
    assert made.needs == inner.needs == needs
    assert torch.equal(made.score(test), inner.score(test))
    features = extract(edited, test, needs)
    assert torch.equal(made.score_features(features), inner.score_features(features))
    vanilla = create_detector(scorer, backbone=backbone, class_names=CLASSES).score(test)
    assert not torch.allclose(made.score(test), vanilla, rtol=1e-4)
    predicted = inner.predict(features)
    assert (made.predict(features) is None) if predicted is None else torch.equal(made.predict(features), predicted)


def test_features_of_the_backbone_before_the_edit_are_refused(clip, test, fitted):
    features = extract(clip, test, {"image"})
    for use in (fitted.score_features, fitted.is_ood, fitted.calibrate):
        with pytest.raises(UsageError, match="These features are of backbone"):
            use(features)
    assert len(fitted.score_features(extract(fitted.backbone, test, {"image"}))) == len(test)


def test_calibrate_and_decide(clip, train, test):
    made = setar(clip).fit(train)
    with pytest.raises(NotFittedError, match="calibrate"):
        made.is_ood(test)
    made.calibrate(test, tpr=0.75)
    scores = made.score(test)
    assert made.threshold == scores.sort(descending=True).values[17].item()  # 18 of 24
    assert torch.equal(made.is_ood(test), scores < made.threshold)
    assert made.p_value(test).max() <= 1
    made.fit(train)
    assert made.threshold is None


# ---- another fit, another edit, other options


def test_another_fit_starts_from_the_original_weights(clip, make, train, test):
    labels = ["cat", "bee", "eel", "dog"]
    made = setar(clip).fit(train).fit(make.photos(labels, seed=4))
    afresh = setar(clip).fit(make.photos(labels, seed=4))
    assert made.edit.record["search"] == afresh.edit.record["search"]
    assert made.edit.record["steps"] == afresh.edit.record["steps"]
    assert made.edit.ratios == afresh.edit.ratios != searched(clip, train).ratios
    assert_equal_weights(made.backbone, afresh.backbone)
    assert torch.equal(made.score(test), afresh.score(test))


def test_new_options_drop_the_fit(clip, train, test):
    made = setar(clip).fit(train).calibrate(test)
    for params in ({"scorer": "gl_mcm"}, {"ratios": [0.3]}, {"scorer": "energy"}):
        made.set_params(**params)
        assert not made.fitted
        assert made.edit is None
        assert made.threshold is None
        assert not made.backbone.edits
        with pytest.raises(NotFittedError, match="has not been fitted"):
            made.score(test)
        made.fit(train)
        afresh = setar(clip, **made.get_params()).fit(train)
        assert made.needs == afresh.needs
        assert torch.equal(made.score(test), afresh.score(test))
    with pytest.raises(UsageError, match="Unknown option of 'setar' 'ratio'"):
        made.set_params(ratio=0.3)
    assert made.set_params().fitted


def test_an_edit_made_elsewhere(clip, make, train, test):
    edit = SeTAREdit({"visual.1.up": 0.4, "text.0.up": 0.3}, clip.fingerprint)
    made = setar(clip)
    assert made.use(edit) is made
    inner = create_detector("mcm", backbone=edit.apply(clip), class_names=CLASSES)
    assert torch.equal(made.score(test), inner.score(test))
    made.calibrate(test)
    other = SeTAREdit({"visual.0.up": 0.4}, clip.fingerprint)
    made.use(other)  # instead of the first, not on top of it
    assert made.threshold is None
    inner = create_detector("mcm", backbone=other.apply(clip), class_names=CLASSES)
    assert torch.equal(made.score(test), inner.score(test))
    with pytest.raises(UsageError, match="made for a backbone with fingerprint"):
        made.use(SeTAREdit({"visual.0.up": 0.4}, make.clip(seed=9).fingerprint))
    assert made.edit is other
    assert torch.equal(made.score(test), inner.score(test))
    with pytest.raises(UsageError, match="no backbone"):
        create_detector("setar", class_names=CLASSES).use(edit)
    made.fit(train)
    assert torch.equal(made.score(test), setar(clip).fit(train).score(test))


def test_an_edit_made_elsewhere_brings_its_class_names(clip, train, test):
    edit = searched(clip, train)
    made = setar(clip, None).use(edit)
    assert made.class_names == CLASSES
    assert torch.equal(made.score(test), setar(clip).fit(train).score(test))
    with pytest.raises(UsageError, match="class_names"):
        setar(clip, None).use(SeTAREdit({"visual.0.up": 0.4}))
    for scorer, options in (("knn", {}), ("energy", {"class_names": None})):
        with pytest.raises(UsageError, match=f"'{scorer}' would have to be fitted itself"):
            setar(clip, scorer=scorer, **options).use(SeTAREdit({"visual.0.up": 0.4}))


def test_fine_tuning_follows_the_search(clip, train, test):
    options = {"finetune_epochs": 1, "batch_size": 3, "learning_rate": 0.02}
    made = setar(clip, **options).fit(train)
    found = searched(clip, train)
    rest = {"epochs": 1, "batch_size": 3, "learning_rate": 0.02, "seed": 3, "progress": False}
    tuned = finetune(clip, train, found, class_names=CLASSES, k=2, **rest)
    assert made.edit.ratios == found.ratios
    assert made.edit.factors
    assert made.edit.record["finetune"] == tuned.record["finetune"]
    assert_equal_weights(made.backbone, tuned.apply(clip))
    inner = create_detector("mcm", backbone=tuned.apply(clip), class_names=CLASSES)
    assert torch.equal(made.score(test), inner.score(test))
    assert not torch.equal(made.score(test), setar(clip).fit(train).score(test))


# ---- storage


def test_save_and_load(saved, test):
    made, folder, scores = saved
    loaded = Detector.from_pretrained(folder)
    assert isinstance(loaded, SeTAR)
    assert loaded.fitted
    assert loaded._held.backbone is None
    assert loaded.get_params() == made.get_params()
    assert (loaded.threshold, loaded.tpr) == (made.threshold, 0.8)
    assert loaded.edit.ratios == made.edit.ratios
    features = extract(made.backbone, test, made.needs)
    assert torch.equal(loaded.score_features(features), scores)  # without loading a backbone
    assert loaded._held.backbone is None
    assert torch.equal(loaded.score(test), scores)
    assert torch.equal(loaded.is_ood(test), made.is_ood(test))
    assert torch.equal(loaded.p_value(test), made.p_value(test))


def test_a_moved_folder_still_loads(saved, test, tmp_path):
    _, folder, scores = saved
    shutil.copytree(folder, tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "second")
    loaded = Detector.from_pretrained(tmp_path / "second")
    assert torch.equal(loaded.score(test), scores)
    loaded.save_pretrained(tmp_path / "third")
    assert torch.equal(Detector.from_pretrained(tmp_path / "third").score(test), scores)


def test_a_repository_is_fetched_with_its_edit(saved, test, tmp_path, monkeypatch):
    made, folder, scores = saved
    hub = pytest.importorskip("huggingface_hub")

    def fetch(name, *, allow_patterns):
        assert name == "someone/detector"
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for file in hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    loaded = Detector.from_pretrained("someone/detector", backbone=made._original)
    assert torch.equal(loaded.score(test), scores)


def test_a_loaded_detector_takes_its_backbone_in_any_form(saved, tiny, test):
    made, folder, scores = saved
    edited = SeTAREdit.from_pretrained(folder / "edit").apply(tiny)
    for backbone in ("tiny", tiny, edited, edited.spec):
        loaded = Detector.from_pretrained(folder, backbone=backbone)
        assert loaded.backbone.fingerprint == made.backbone.fingerprint
        assert torch.equal(loaded.score(test), scores)
    assert not tiny.edits


def test_a_loaded_detector_refuses_other_backbones(saved, clip, tiny):
    _, folder, _ = saved
    other = SeTAREdit({"visual.0.up": 0.2}).apply(tiny)
    for backbone, words in ((clip, "made for a backbone with fingerprint"), (other, "was made with backbone 'tiny'")):
        with pytest.raises(UsageError, match=words):
            Detector.from_pretrained(folder, backbone=backbone)


def test_a_loaded_detector_can_be_fitted_again(saved, tiny, train, test):
    made, folder, scores = saved
    for backbone in (None, tiny):
        loaded = Detector.from_pretrained(folder, backbone=backbone)
        assert torch.equal(loaded.fit(train).score(test), scores)
        assert loaded.threshold is None
    loaded = Detector.from_pretrained(folder).set_params(scorer="mcm")
    assert not loaded.fitted
    inner = create_detector("mcm", backbone=made.edit.apply(tiny), class_names=CLASSES)
    assert torch.equal(loaded.fit(train).score(test), inner.score(test))
    edited = SeTAREdit.from_pretrained(folder / "edit").apply(tiny)
    with pytest.raises(UsageError, match="edited already"):
        Detector.from_pretrained(folder, backbone=edited).fit(train)


@pytest.mark.parametrize(("scorer", "kind"), [("energy", "clip"), ("msp", "vit"), ("energy", "vit"), ("mcm", "clip")])
def test_every_scorer_is_saved(request, train, test, tmp_path, scorer, kind):
    backbone = request.getfixturevalue(kind)
    made = setar(backbone, scorer=scorer, finetune_epochs=1).fit(train)
    made.save_pretrained(tmp_path)
    features = extract(made.backbone, test, made.needs)
    for given in (None, backbone, made.backbone):
        loaded = Detector.from_pretrained(tmp_path, backbone=given)
        assert loaded.needs == made.needs
        assert torch.equal(loaded.score_features(features), made.score(test))
        if given is not None:
            assert torch.equal(loaded.score(test), made.score(test))


def test_a_detector_without_a_fit_is_saved_as_such(saved, clip, train, tmp_path):
    _, folder, _ = saved
    shutil.copytree(folder, tmp_path / "detector")
    setar(clip).save_pretrained(tmp_path / "detector")  # over a fitted one
    loaded = Detector.from_pretrained(tmp_path / "detector", backbone=clip)
    assert not loaded.fitted
    assert loaded.fit(train).edit.ratios == setar(clip).fit(train).edit.ratios


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_precision_at_load_may_be_another(make, tmp_path, dtype):
    """An edit is one edit, whatever its weights were rounded to."""
    few = make.photos(CLASSES, seed=1)
    made = setar(create_backbone("tiny", dtype=dtype)).use(SeTAREdit({"visual.1.up": 0.4}))
    made.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path, backbone=create_backbone("tiny", dtype="float32"))
    torch.testing.assert_close(loaded.score(few), made.score(few), rtol=1e-2, atol=0)
    Detector.from_pretrained(tmp_path, backbone=create_backbone("tiny", dtype="bfloat16"))


def test_a_fingerprint_says_what_was_done_not_how_it_was_rounded(clip, make):
    single = make.clip()
    single.model.float()
    b, a = torch.ones(96, 2), torch.ones(2, 24)
    edits = [
        SeTAREdit({"visual.1.up": 0.4}),
        SeTAREdit({"visual.1.up": 0.2}),
        SeTAREdit({"visual.0.up": 0.4}),
        SeTAREdit({"visual.1.up": 0.4}, drop="principal"),
        SeTAREdit({"visual.1.up": 0.4}, drop="random"),
        SeTAREdit({"visual.1.up": 0.4}, drop="random", seed=6),
        SeTAREdit({"visual.1.up": 0.4}, factors={"visual.1.up": (b, a)}),
        SeTAREdit({"visual.1.up": 0.4}, factors={"visual.1.up": (b, 2 * a)}),
        SeTAREdit({"visual.1.up": 0.4}, factors={"visual.1.up": (b, a)}, scale=2.0),
    ]
    fingerprints = [edit.apply(clip).fingerprint for edit in edits]
    assert len({clip.fingerprint, *fingerprints}) == 1 + len(edits)
    assert [edit.apply(single).fingerprint for edit in edits] == fingerprints
    for edit, expected in zip(edits, fingerprints, strict=True):
        with edit.applied(clip):
            assert clip.fingerprint == expected
    assert clip.fingerprint == single.fingerprint


# ---- evaluation


def test_evaluate_fits_on_images_what_must_be(clip, make, train, test, tmp_path):
    detectors = {
        "mcm": create_detector("mcm", backbone=clip, class_names=CLASSES),
        "setar": setar(clip),
        "knn": create_detector("knn", backbone=clip, k=2),
    }
    far = make.photos(["far"] * 5, seed=7)
    found = evaluate(detectors, id=test, ood={"far": far}, fit=train, calibrate=test, progress=False)
    assert detectors["setar"].edit.ratios == searched(clip, train).ratios
    for name, detector in detectors.items():
        for source, images in (("id", test), ("far", far)):
            assert found.scores.scores(name, source).tolist() == detector.score(images).tolist()
        assert found.results["detectors"][name]["threshold"] == detector.threshold
    assert found.results["detectors"]["setar"]["params"]["scorer"] == "mcm"
    backbones = {one["fingerprint"]: one["spec"] for one in found.results["environment"]["backbones"]}
    assert set(backbones) == {clip.fingerprint, detectors["setar"].backbone.fingerprint}
    with pytest.raises(NotFittedError, match="'setar' must be fitted"):
        evaluate(setar(clip), id=test, ood={"far": far})
