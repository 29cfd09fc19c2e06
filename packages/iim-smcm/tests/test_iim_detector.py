"""IIM as a detector: fitting, scores, storage, the released checkpoints, and what is refused."""

import json
import os
import runpy
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ood_core import create_detector, extract
from ood_core.backbones.timm import TimmBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import FewShot, ImageFolder, PILImages
from ood_core.detectors.base import Detector, right_predictions
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.evaluation import evaluate
from ood_core.features import FeatureSet
from ood_core.functional import gl_mcm, mcm, r_mcm
from ood_iim import functional
from ood_iim.detectors import IIM
from ood_iim.learner import PromptLearner, learning_rate
from ood_iim.studies import sweep
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

CLASSES = ["brick square", "dotted ring", "glossy circle", "striped star"]  # as the folders sort
FAST = {"negative_prompts": 3, "context_length": 4, "epochs": 3, "batch_size": 8, "learning_rate": 0.02}
WIDTH, EMBED, PATCHES = 16, 12, 16
LEARNED = {
    "context": (4, 4, WIDTH),
    "negative_context": (3, 4, WIDTH),
    "text_projection": (WIDTH, EMBED),
}
TEXTS = {"text": (4, EMBED), "local_text": (4, EMBED), "negatives": (3, EMBED)}


def iim(backbone, **options):
    return create_detector("iim", backbone=backbone, **FAST | options)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for each other on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def features(small_backbone, image_folder):
    return extract(small_backbone, image_folder)


@pytest.fixture(scope="module")
def shared(small_backbone, features):
    """Fitted once for the tests that leave it as it is."""
    return iim(small_backbone).fit(features)


@pytest.fixture
def fitted(shared, small_backbone):
    made = iim(small_backbone)
    made.state, made.class_names, made.template = dict(shared.state), list(shared.class_names), shared.template
    made.history = list(shared.history)
    return made


# ---- fitting


def test_fitting_on_features_lowers_the_loss(shared):
    assert shared.class_names == CLASSES
    assert {name: tuple(value.shape) for name, value in shared.state.items()} == LEARNED | TEXTS
    assert [set(epoch) for epoch in shared.history] == [
        {"positive", "negative", "diversity", "loss", "learning_rate"}
    ] * 3
    assert shared.history[-1]["loss"] < shared.history[0]["loss"]
    for epoch in shared.history:
        assert epoch["loss"] == pytest.approx(epoch["positive"] + epoch["negative"] + epoch["diversity"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_form": "released", "region": "all", "train_k": 3, "hard_negative_mining": False},
        {"lambda_neg": 2.0, "lambda_div": 0.0, "momentum": 0.0, "weight_decay": 0.1},
        {"shared_context": True, "train_text_projection": False},
        {"context_init": "a photo", "negative_prompts": 0, "seed": 5},
    ],
)
def test_fitting_is_sgd_on_the_losses(small_backbone, features, options):
    made = iim(small_backbone, **options, batch_size=32).fit(features)
    used = made.get_params()
    names = ("shared_context", "context_init", "train_text_projection", "seed", "context_length")
    learner = PromptLearner(
        small_backbone, CLASSES, negatives=used["negative_prompts"], **{name: used[name] for name in names}
    )
    optimizer = torch.optim.SGD(
        learner.learned().values(), momentum=used["momentum"], weight_decay=used["weight_decay"]
    )
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, peak=0.02, epochs=3)
        terms = learner.losses(
            features.local,
            features.labels,
            k=used["train_k"] or 4,  # a quarter of 16 patches
            form=used["loss_form"],
            **{name: used[name] for name in ("lambda_neg", "lambda_div", "region", "hard_negative_mining")},
        )
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        expected = {name: term.item() for name, term in terms.items()}
        got = {name: value for name, value in made.history[epoch].items() if name not in ("loss", "learning_rate")}
        assert got == pytest.approx(expected, rel=1e-4)
    for name, value in learner.named_parameters():
        if value.numel():
            torch.testing.assert_close(made.state[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_the_texts_are_those_of_the_learned_prompts(shared, small_backbone):
    state = shared.state
    for context, names, texts in (
        (state["context"], CLASSES, state["local_text"]),
        (state["negative_context"], [""] * 3, state["negatives"]),
    ):
        found = small_backbone.encode_prompts(context, names, projection=state["text_projection"])
        torch.testing.assert_close(texts, found, rtol=1e-5, atol=1e-6)
    plain = small_backbone.encode_text([f"a photo of a {name}." for name in CLASSES])
    assert torch.equal(state["text"], plain)
    assert not torch.allclose(state["text_projection"], small_backbone.text_projection)


@pytest.mark.parametrize("views", [0, 2])
def test_fitting_on_images(small_backbone, image_folder, features, views, tmp_path):
    cache = tmp_path / "cache"
    made = iim(small_backbone, views=views).fit(image_folder, cache=cache)
    assert made.history[-1]["loss"] < made.history[0]["loss"]
    assert made.class_names == CLASSES
    assert made.score_features(features).isfinite().all()
    assert len(list(cache.rglob("*.safetensors"))) == (1 if views else 0)


def test_cached_views_are_not_encoded_again(small_backbone, image_folder, tmp_path, monkeypatch):
    first = iim(small_backbone, views=2).fit(image_folder, cache=tmp_path)
    monkeypatch.setattr(small_backbone, "encode", None)
    again = iim(small_backbone, views=2).fit(image_folder, cache=tmp_path)
    assert again.history == first.history


def test_new_views_every_epoch_are_as_many_cached_ones(small_backbone, image_folder):
    live, cached = (iim(small_backbone, views=views).fit(image_folder) for views in (0, 3))
    for name, value in live.state.items():
        torch.testing.assert_close(cached.state[name], value, rtol=1e-4, atol=1e-5)
    fewer = iim(small_backbone, views=1).fit(image_folder)
    assert fewer.history[0] == pytest.approx(live.history[0], rel=1e-4)
    assert fewer.history[2]["loss"] != pytest.approx(live.history[2]["loss"], rel=1e-4)


def test_worker_processes_change_no_result(small_backbone, image_folder):
    states = [iim(small_backbone, epochs=2, batch_size=4).fit(image_folder, workers=n).state for n in (0, 1, 2)]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_the_temperature_of_the_losses(small_backbone, features):
    scale = float(small_backbone.logit_scale)
    own, same, literal = (
        iim(small_backbone, train_temperature=t).fit(features).history for t in (None, 1 / scale, 1.0)
    )
    assert same[0]["positive"] == pytest.approx(own[0]["positive"], rel=1e-5)
    assert abs(literal[0]["positive"] - own[0]["positive"]) > 1e-2


def test_equal_seeds_give_equal_scores(shared, small_backbone, features):
    again, other = (iim(small_backbone, seed=seed).fit(features) for seed in (1, 2))
    assert again.history == shared.history
    assert torch.equal(again.score_features(features), shared.score_features(features))
    assert not torch.equal(other.score_features(features), shared.score_features(features))


def test_how_many_prompts_are_in_memory_changes_no_result(shared, small_backbone, features):
    bounded = iim(small_backbone, max_prompt_batch=2).fit(features)
    torch.testing.assert_close(bounded.state, shared.state, rtol=1e-4, atol=1e-5)


def test_few_shots_and_classes_that_have_fewer(small_backbone, image_folder):
    few = FewShot(ImageFolder(image_folder), 50, seed=1)
    assert len(few) == 20
    made = iim(small_backbone, views=1).fit(few)
    assert made.class_names == CLASSES
    assert len(made.history) == 3


def test_a_class_without_images_is_learned_from_the_others(small_backbone, features):
    names = ["unseen class", *reversed(CLASSES)]
    made = iim(small_backbone, class_names=names).fit(features)
    assert made.state["context"].shape[0] == made.state["text"].shape[0] == 5
    assert made.class_names == names
    right = (made.predict(features) == 4 - features.labels).float().mean()
    assert right_predictions(made, features).float().mean() == right


def test_fitting_forgets_the_calibration(fitted, features):
    fitted.calibrate(torch.rand(30)).fit(features)
    with pytest.raises(NotFittedError, match="not been calibrated"):
        fitted.is_ood(features)


# ---- scores


@pytest.mark.parametrize("options", [{}, {"k": 33, "temperature": 0.1, "alpha": 0.3}, {"form": "released"}])
@pytest.mark.parametrize("negatives", ["use", "ignore"])
def test_scores_are_s_mcm_of_the_state(fitted, features, options, negatives):
    fitted.set_params(negatives=negatives, **options)
    scores, state = fitted.score_features(features), fitted.state
    given = state["negatives"] if negatives == "use" else None
    expected = functional.s_mcm(
        features.image, features.local, state["text"], state["local_text"], given, **{"k": 4} | options
    )
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)


def test_without_negative_prompts_using_them_is_ignoring_them(small_backbone, features):
    made = iim(small_backbone, negative_prompts=0).fit(features)
    assert set(made.state) == {"context", "text_projection", "text", "local_text"}
    scores = made.score_features(features)
    assert torch.equal(made.set_params(negatives="ignore").score_features(features), scores)
    found = made.components(features)
    assert torch.equal(found.star, found.image_to_text)


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_components_give_all_six_scores(fitted, features, temperature):
    found, state = fitted.components(features, ks=[4, 1, 20], temperature=temperature), fitted.state
    image, local, text, local_text, negatives = (
        features.image,
        features.local,
        state["text"],
        state["local_text"],
        state["negatives"],
    )
    at = {"temperature": temperature or 1.0}
    for k in (1, 4, 20):
        for alpha in (0.0, 0.9, 1.5):
            scores = found.scores(k, alpha)
            local_only = -mcm(image, local_text, **at) + mcm(image, text, **at)  # those functions take one text only
            expected = {
                "mcm": mcm(image, text, **at),
                "gl_mcm": gl_mcm(image, local, local_text, **at) + local_only,
                "r_mcm*": r_mcm(image, local, local_text, k=k, **at) + local_only,
                "r_mcm": r_mcm(image, local, local_text, negatives, k=k, **at) + local_only,
                "s_mcm*": functional.s_mcm(image, local, text, local_text, k=k, alpha=alpha, **at),
                "s_mcm": functional.s_mcm(image, local, text, local_text, negatives, k=k, alpha=alpha, **at),
            }
            assert scores.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(scores[name], value, rtol=1e-5, atol=1e-6)


def test_components_and_sweeps_are_in_the_form_of_the_score(fitted, features):
    paper = fitted.components(features).scores(1)
    fitted.set_params(form="released")
    ks = [20, 1, 4]
    found = fitted.components(features, ks=ks)
    for k in ks:
        own = {
            name: one.set_params(k=k).score_features(features)
            for name, one in fitted.variants().items()
            if name not in ("mcm", "gl_mcm")
        }
        for name, expected in own.items():
            np.testing.assert_allclose(found.scores(k)[name], expected, rtol=1e-6)
    assert not torch.allclose(found.scores(1)["s_mcm"], paper["s_mcm"], rtol=1e-5)
    judged = evaluate({"iim": fitted.set_params(k=4)}, id=features, ood={"o": features[::2]})
    (row,) = (
        r
        for r in sweep(fitted, id=features, ood={"o": features[::2]}, ks=ks, alphas=[1.0])
        if r["k"] == 4 and r["negatives"] == "use"
    )
    assert row["auroc"] == judged.results["detectors"]["iim"]["average"]["auroc"]
    assert row["convention"] == "standard"


def test_components_by_default_and_out_of_range(fitted, features):
    found = fitted.set_params(k=7).components(features)
    assert found.ks == (1, 7)
    torch.testing.assert_close(found.scores(7)["s_mcm"], fitted.score_features(features))
    assert "gl_mcm" not in fitted.components(features, ks=[7]).scores(7)
    with pytest.raises(ValueError, match="k=3 must be one of 1, 7"):
        found.scores(3)
    with pytest.raises(ValueError, match=r"k=\[\] is empty"):
        fitted.components(features, ks=[])
    with pytest.raises(ValueError, match=r"k=65 is outside \[1, 64\]"):
        fitted.components(features, ks=[65])
    with pytest.raises(ValueError, match="temperature=0"):
        fitted.components(features, temperature=0.0)


def test_variants_are_the_six_scores(fitted, features):
    fitted.set_params(alpha=0.7)
    fitted.calibrate(torch.rand(30))
    expected = fitted.components(features).scores(4, 0.7)
    variants = fitted.variants()
    assert set(variants) == set(expected)
    for name, detector in variants.items():
        torch.testing.assert_close(detector.score_features(features), expected[name], rtol=1e-5, atol=1e-6)
    assert fitted.alpha == 0.7
    assert fitted.threshold is not None


def test_predictions_are_the_released_logits(fitted, features, monkeypatch):
    state = fitted.state
    logits = functional.id_logits(features.image, features.local, state["text"], state["local_text"], k=4)
    predicted = fitted.predict(features)
    assert predicted.dtype == torch.int64
    assert torch.equal(predicted, logits.argmax(1))
    monkeypatch.setattr(type(fitted), "chunk", 3)
    assert torch.equal(fitted.predict(features), predicted)
    assert torch.equal(fitted.set_params(k=64).predict(features), torch.cat([
        functional.id_logits(part.image, part.local, state["text"], state["local_text"], k=16).argmax(1)
        for part in (features[:10], features[10:])
    ]))  # fmt: skip


def test_before_fit(small_backbone, features):
    made = iim(small_backbone, class_names=CLASSES)
    for call in (made.score_features, made.components, made.predict, lambda _: made.variants()):
        with pytest.raises(NotFittedError, match=r"'iim' has not been fitted: call fit\(features or images\)"):
            call(features)


def test_score_options_keep_what_was_learned_and_others_drop_it(fitted, features):
    state = dict(fitted.state)
    fitted.set_params(k=9, temperature=0.5, alpha=0.2, negatives="ignore", form="released", max_prompt_batch=None)
    assert fitted.state == state
    for change in ({"epochs": 4}, {"train_k": 2}, {"seed": 2}, {"lambda_neg": 1.0}, {"views": 2}):
        fitted.state = dict(state)
        fitted.set_params(**change)
        with pytest.raises(NotFittedError, match="'iim' has not been fitted"):
            fitted.score_features(features)


# ---- storage


def test_saved_and_loaded_is_the_same_without_a_backbone(fitted, features, small_backbone, tmp_path):
    fitted.set_params(k=5, alpha=0.5).calibrate(features)
    fitted.save_pretrained(tmp_path / "saved")
    names = ["config.json", "model.safetensors", "training.json"]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == names
    loaded = Detector.from_pretrained(tmp_path / "saved")
    assert type(loaded) is IIM
    assert loaded.get_params() == fitted.get_params()
    assert loaded.class_names == CLASSES
    assert loaded.template == "a photo of a {}."
    for call in ("score_features", "is_ood", "p_value", "predict"):
        assert torch.equal(getattr(loaded, call)(features), getattr(fitted, call)(features))
    with_backbone = IIM.from_pretrained(tmp_path / "saved", backbone=small_backbone)
    assert torch.equal(with_backbone.score_features(features), fitted.score_features(features))


def test_the_record_of_the_training_is_kept(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "training.json").read_text()) == fitted.history
    loaded = IIM.from_pretrained(tmp_path / "one")
    assert loaded.history == fitted.history
    loaded.save_pretrained(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "training.json").read_text()) == fitted.history
    (tmp_path / "one" / "training.json").write_text("{")
    with pytest.raises(DataError, match=r"training\.json is no record of a training"):
        IIM.from_pretrained(tmp_path / "one")
    (tmp_path / "one" / "training.json").unlink()  # as from the hub
    assert IIM.from_pretrained(tmp_path / "one").history == []


def test_only_learned_tensors_and_texts_are_saved(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        f"state.{name}": shape for name, shape in (LEARNED | TEXTS).items()
    }
    numbers = sum(value.numel() for value in saved.values())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 4 * numbers < size < 4 * numbers + 1000


# ---- going on


class _Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["features", "images"])
def test_a_resumed_fit_is_bit_identical(shared, small_backbone, image_folder, features, kind, tmp_path, monkeypatch):
    data, file = features if kind == "features" else image_folder, tmp_path / "checkpoint.safetensors"
    whole = shared if kind == "features" else iim(small_backbone).fit(data)
    losses, calls = PromptLearner.losses, []

    def failing(self, *args, **options):
        calls.append(None)
        if len(calls) == 4:  # two steps per epoch: in the second epoch
            raise _Stop
        return losses(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PromptLearner, "losses", failing)
        with pytest.raises(_Stop):
            iim(small_backbone).fit(data, checkpoint=file)
    resumed = iim(small_backbone, max_prompt_batch=100).fit(data, checkpoint=file)  # no part of the recipe
    assert resumed.history == whole.history
    assert all(torch.equal(resumed.state[name], value) for name, value in whole.state.items())
    tensors = set(load_file(file))
    assert {name for name in tensors if name.startswith("parameter.")} == {f"parameter.{name}" for name in LEARNED}
    assert len(tensors) == 6  # and their momenta


def test_a_checkpoint_of_other_images_or_options_is_refused(small_backbone, image_folder, features, tmp_path):
    file = tmp_path / "checkpoint"
    iim(small_backbone, epochs=1).fit(features[:10], checkpoint=file)
    for data, options, named in (
        (features[10:], {}, "images"),  # other rows of the same source
        (ImageFolder(image_folder).subset(range(10)), {}, "images"),
        (replace(features[:10], labels=features.labels[:10].flip(0)), {}, "images"),
        (features[:10], {"lambda_neg": 1.0, "train_k": 2}, "lambda_neg, train_k"),
        (features[:10], {"epochs": 2}, "epochs"),
        (features[:10], {"class_names": [*CLASSES, "more"]}, "class_names, parameters"),
    ):
        with pytest.raises(UsageError, match=rf"other settings \({named}\)"):
            iim(small_backbone, **{"epochs": 1} | options).fit(data, checkpoint=file)


# ---- checkpoints of the released code


def released_state(classes=4, negatives=3, length=4, width=WIDTH, embed=EMBED):
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_learner.local_ctx": 0.1 * torch.randn(classes, length, width, generator=generator),
        "prompt_learner.neg_ctx": 0.1 * torch.randn(negatives, length, width, generator=generator),
        "text_encoder.text_projection": torch.randn(width, embed, generator=generator),
        "image_encoder.proj": torch.zeros(5, 5),  # both CLIP copies are in the file
    }


def from_released(path, backbone, **options):
    return IIM.from_released(path, backbone=backbone, **{"class_names": CLASSES} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_released_checkpoint(small_backbone, features, dtype, tmp_path):
    state = {name: value.to(dtype) for name, value in released_state().items()}
    torch.save({"state_dict": state, "epoch": 50, "val_result": None}, tmp_path / "model.pth.tar-50")
    made = from_released(tmp_path / "model.pth.tar-50", small_backbone, k=9)
    assert made.get_params() | {"k": 9, "negative_prompts": 3, "context_length": 4} == made.get_params()
    context, negative, projection = (value.float() for value in list(state.values())[:3])
    text = small_backbone.encode_text([f"a photo of a {name}." for name in CLASSES])
    local_text = small_backbone.encode_prompts(context, CLASSES, projection=projection)
    negatives = small_backbone.encode_prompts(negative, [""] * 3, projection=projection)
    expected = functional.s_mcm(features.image, features.local, text, local_text, negatives, k=9)
    torch.testing.assert_close(made.score_features(features), expected, rtol=1e-5, atol=1e-6)
    made.save_pretrained(tmp_path / "ours")
    assert torch.equal(IIM.from_pretrained(tmp_path / "ours").score_features(features), made.score_features(features))


def test_a_released_checkpoint_with_its_optimiser_and_schedule(small_backbone, features, tmp_path):
    """As its training library writes it: the schedule after the warm-up is saved as an object."""

    class Warmup(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer, successor):
            self.successor, self.warmup_epoch, self.cons_lr = successor, 1, 1e-5
            super().__init__(optimizer)

        def get_lr(self):
            return [self.cons_lr for _ in self.base_lrs]

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=2.5e-4, momentum=0.9, weight_decay=5e-4)
    schedule = Warmup(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0))
    parameter.sum().backward()
    optimizer.step()
    content = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "val_result": None, "epoch": 50}
    torch.save({"state_dict": released_state(), **content}, tmp_path / "full")
    torch.save({"state_dict": released_state()}, tmp_path / "plain")
    full, plain = (from_released(tmp_path / name, small_backbone) for name in ("full", "plain"))
    assert torch.equal(full.score_features(features), plain.score_features(features))


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"classes": 5}, UsageError, r"context is \[5, 4, 16\], but 4 classes on 'small' need \[4, 4, 16\]"),
        ({"width": 20}, UsageError, r"context is \[4, 4, 20\].*need \[4, 4, 16\]"),
        ({"embed": 13}, UsageError, r"text_projection is \[16, 13\].*need \[16, 12\]"),
        ({"length": 70}, ValueError, "takes 77"),
    ],
)
def test_a_released_checkpoint_of_other_sizes(small_backbone, sizes, error, words, tmp_path):
    torch.save({"state_dict": released_state(**sizes)}, tmp_path / "model")
    with pytest.raises(error, match=words):
        from_released(tmp_path / "model", small_backbone)


@pytest.mark.parametrize("key", ["prompt_learner.local_ctx", "prompt_learner.neg_ctx", "text_encoder.text_projection"])
def test_a_released_checkpoint_that_lacks_a_tensor(small_backbone, key, tmp_path):
    state = released_state()
    for broken in (None, torch.zeros(3), "text"):
        content = {name: value for name, value in (state | {key: broken}).items() if value is not None}
        torch.save({"state_dict": content}, tmp_path / "model")
        with pytest.raises(DataError, match=rf"model is no checkpoint of the released IIM code: it has no '{key}'"):
            from_released(tmp_path / "model", small_backbone)
    torch.save([1, 2], tmp_path / "model")
    with pytest.raises(DataError, match="is no checkpoint of the released IIM code"):
        from_released(tmp_path / "model", small_backbone)


class _Touch:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_released_checkpoint_runs_no_code(small_backbone, tmp_path):
    for extra in (_Touch(tmp_path / "made"), Path("somewhere"), Counter("aab")):
        torch.save({"state_dict": released_state(), "extra": extra}, tmp_path / "model")
        if isinstance(extra, Counter):
            assert from_released(tmp_path / "model", small_backbone).fitted  # known to be harmless
            continue
        with pytest.raises(DataError, match=r"model is no checkpoint of tensors only \(UnpicklingError: ") as caught:
            from_released(tmp_path / "model", small_backbone)
        assert "weights_only" not in str(caught.value)  # the advice of torch to switch the check off
    assert not (tmp_path / "made").exists()


def test_no_checkpoint_at_all(small_backbone, tmp_path):
    with pytest.raises(MissingDataError, match=r"no checkpoint .*nothing: .*model\.pth\.tar-50"):
        from_released(tmp_path / "nothing", small_backbone)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="text is no checkpoint of tensors only"):
        from_released(tmp_path / "text", small_backbone)
    torch.save({"state_dict": released_state()}, tmp_path / "model")
    (tmp_path / "cut").write_bytes((tmp_path / "model").read_bytes()[:-500])
    with pytest.raises(DataError, match="cut is no checkpoint of tensors only"):
        from_released(tmp_path / "cut", small_backbone)


# ---- what is refused


def image(seed):
    return Image.effect_noise((32, 32), 10 + seed).convert("RGB")


def test_images_without_labels(small_backbone, features):
    made = iim(small_backbone)
    for unlabelled in ([image(0), image(1)], PILImages([image(0)]), replace(features, labels=None)):
        with pytest.raises(DataError, match="'iim' needs labelled images to fit"):
            made.fit(unlabelled)
    some = features.labels.clone()
    some[[2, 5]] = -1
    with pytest.raises(DataError, match="2 of the images to fit on have no label"):
        made.fit(replace(features, labels=some))
    assert not made.fitted


@pytest.mark.parametrize("twin", ["dotted ring", "dotted_ring", " dotted ring"])
def test_class_names_given_twice(small_backbone, features, twin):
    with pytest.raises(UsageError, match=r"'dotted ring'.* is given twice"):
        iim(small_backbone, class_names=[*CLASSES, twin])
    names = [CLASSES[0], twin, *CLASSES[2:]]
    names[3] = "dotted ring"
    with pytest.raises(UsageError, match=r"dotted.ring'.* is given twice"):
        iim(small_backbone).fit(replace(features, label_names=names))


def test_a_class_name_longer_than_the_context(small_backbone, features, monkeypatch):
    monkeypatch.setattr(small_backbone, "encode", None)  # it shows before any image is read
    long = ["x" * 80, *CLASSES[1:]]
    with pytest.raises(ValueError, match=r"'xxx.*needs 81 tokens.* takes 77. Shorten the name or the context"):
        iim(small_backbone, views=2).fit(replace(features, label_names=long))


def test_a_template_that_does_not_fit_shows_before_the_training(small_backbone, features, monkeypatch):
    monkeypatch.setattr(PromptLearner, "losses", None)
    with pytest.raises(UsageError, match="template without"):
        iim(small_backbone, template="a photo").fit(features)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_k": 9}, r"train_k=9 is outside \[1, 8\] .*behind the train_k best of 16: lower train_k"),
        ({"train_k": 16, "region": "all"}, r"train_k=16 is outside \[1, 15\] .*lower train_k"),
        ({"train_k": 17, "lambda_neg": 0.0}, r"train_k=17 is outside \[1, 16\] \(the grid has 16 patches\)"),
        ({"train_k": 17, "negative_prompts": 0}, r"train_k=17 is outside \[1, 16\]"),
    ],
)
def test_train_k_too_large_for_the_grid(small_backbone, features, image_folder, options, words, monkeypatch):
    most = iim(small_backbone, **options | {"train_k": int(words.split("1, ")[1].split("\\")[0]), "epochs": 1})
    assert most.fit(features).fitted
    monkeypatch.setattr(small_backbone, "encode", None)
    for data in (features, image_folder):
        with pytest.raises(ValueError, match=words):
            iim(small_backbone, views=1, **options).fit(data)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": 0}, ValueError, "k=0"),
        ({"k": 2.0}, TypeError, "k must be an integer"),
        ({"temperature": 0}, ValueError, "temperature=0"),
        ({"alpha": -1}, ValueError, "alpha=-1"),
        ({"negatives": "drop"}, ValueError, "negatives='drop'"),
        ({"form": "mine"}, ValueError, "form='mine'"),
        ({"train_k": 0}, ValueError, "train_k=0"),
        ({"loss_form": "mine"}, ValueError, "loss_form='mine'"),
        ({"region": "far"}, ValueError, "region='far'"),
        ({"lambda_neg": float("nan")}, ValueError, "lambda_neg=nan"),
        ({"lambda_div": float("inf")}, ValueError, "lambda_div=inf"),
        ({"negative_prompts": -1}, ValueError, "negative_prompts=-1"),
        ({"context_length": 0}, ValueError, "context_length=0"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate=-0.1"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a number"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1"),
        ({"views": -1}, ValueError, "views=-1"),
        ({"crop_scale": 0}, ValueError, "crop_scale=0"),
        ({"crop_scale": 1.1}, ValueError, "crop_scale=1.1 must be at most 1"),
        ({"max_prompt_batch": 0}, ValueError, "max_prompt_batch=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"lamda_neg": 1}, UsageError, "Did you mean 'lambda_neg'"),
    ],
)
def test_options_out_of_range(options, error, words):
    with pytest.raises(error, match=words):
        create_detector("iim", **options)


def test_a_backbone_without_text(features):
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=EMBED, depth=1, num_heads=2, num_classes=3)
    timm = TimmBackbone(model, ImageTransform(crop=(32, 32), resize=32), spec="timm:small")
    with pytest.raises(UsageError, match=r"Backbone 'timm:small' has no '\w+' .*Use 'tiny', 'open_clip:ViT-B-16"):
        iim(timm)
    with pytest.raises(UsageError, match="'iim' has no backbone"):
        create_detector("iim").fit(features)


def test_features_of_another_backbone(small_backbone, features):
    with pytest.raises(UsageError, match="These features are of backbone 'other'"):
        iim(small_backbone).fit(replace(features, fingerprint="0" * 64, backbone="other"))
    with pytest.raises(UsageError, match=r"have no 'local'"):
        iim(small_backbone).fit(replace(features, local=None))
    narrow = FeatureSet(
        ids=features.ids,
        labels=features.labels,
        label_names=CLASSES,
        image=features.image[:, :5],
        local=features.local[..., :5],
    )
    with pytest.raises(UsageError, match="These features are 5 wide, those of 'small' 12"):
        iim(small_backbone).fit(narrow)


def test_a_training_that_diverges_leaves_the_detector_as_it_was(fitted, features):
    scores, history = fitted.score_features(features), fitted.history
    fitted.learning_rate = 1e30
    with pytest.raises(DataError, match=r"no longer finite .*lower the learning rate"):
        fitted.fit(features)
    assert torch.equal(fitted.score_features(features), scores)
    assert fitted.history == history


# ---- several processes

_SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from ood_core.backbones.base import Backbone
from ood_core.backbones.transform import ImageTransform
from ood_core.evaluation import evaluate
from ood_core.features import FeatureSet
from ood_iim.detectors import IIM
from safetensors.torch import save_file


class Toy(Backbone):
    # The least that prompts can be learned with: running means of byte embeddings, projected.
    capabilities = frozenset({"image", "local", "text", "prompts"})
    grid, width, logit_scale, context_length = (3, 3), 6, 20.0, 40

    def prefix(self, x):
        return x

    image_embedding = prefix

    def tokenize(self, texts):
        rows = [[1, *text.encode(), 255] for text in texts]
        return torch.tensor([row + [0] * (self.context_length - len(row)) for row in rows])

    def end_positions(self, ids):
        return ids.argmax(1)

    def embed_tokens(self, ids):
        return self.model[0](ids)

    def text_hidden(self, embeddings, end):
        x = torch.tanh(embeddings.cumsum(1))
        return x[torch.arange(len(x)), end]

    def project_text(self, hidden):
        return hidden @ self.text_projection

    @property
    def text_projection(self):
        return self.model[1].weight.T


def main(out):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 6, bias=False))
    backbone = Toy(model, ImageTransform(crop=(8, 8), resize=8), spec="toy")
    local = F.normalize(torch.randn(15, 9, 6), dim=-1)
    features = FeatureSet(ids=[str(i) for i in range(15)], labels=torch.arange(15) % 3,
        label_names=["ant", "bee", "wasp"], image=local[:, 0], local=local)
    detector = IIM(negative_prompts=4, context_length=3, epochs=3, batch_size=7, learning_rate=0.02)
    detector.attach(backbone)
    detector.fit(features)
    losses = torch.tensor([epoch["loss"] for epoch in detector.history], dtype=torch.float64)
    found = detector.state | {"losses": losses, "scores": detector.score_features(features)}
    save_file({name: value.contiguous() for name, value in found.items()}, out)


main(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    """The environment is the one that torchrun and accelerate make, without the time they take to start."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "alone")])
    runpy.run_path(str(script))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / f"{rank}"],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, messages = process.communicate(timeout=600)
        assert process.returncode == 0, messages[-3000:]
    alone = load_file(tmp_path / "alone")
    assert alone["losses"][-1] < alone["losses"][0]
    for rank in range(2):
        torch.testing.assert_close(load_file(tmp_path / f"{rank}"), alone, rtol=1e-5, atol=1e-6)
