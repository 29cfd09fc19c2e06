import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_detector, extract
from ood_core.data import ImageFolder
from ood_core.detectors.base import right_predictions
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.evaluation import evaluate
from ood_hvl.detectors import HVL
from ood_hvl.functional import combine, cut, entropy, fuse, keep_mask, patch_probabilities, pool, split_pyramid
from ood_hvl.pyramid import with_pyramid
from ood_hvl.views import TurnedViews
from PIL import Image


def hvl(backbone, **options):
    made = HVL(**({"epochs": 2, "batch_size": 8} | options))
    made.attach(backbone)
    return made


@pytest.fixture(scope="module")
def source(image_folder):
    return ImageFolder(image_folder)


@pytest.fixture(scope="module")
def features(small_backbone, source):
    return extract(with_pyramid(small_backbone), source, {"pyramid"})


@pytest.fixture
def trained(small_backbone, features):
    return hvl(small_backbone).fit(features)


# ---- the pyramid as a feature


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_feature_holds_raw_embeddings_of_every_tile(small_backbone, source, n):
    found = extract(with_pyramid(small_backbone, n, chunk=7), source, {"pyramid", "image"}, batch_size=6)
    pixels = torch.stack([small_backbone.transform(source.open(i)) for i in range(3)])
    crops = split_pyramid(pixels, n)
    expected = small_backbone.encode_image(crops.flatten(0, 1), normalize=False).unflatten(0, crops.shape[:2])
    assert found.extra["pyramid"].dtype == torch.float16
    torch.testing.assert_close(found.extra["pyramid"][:3].float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(F.normalize(expected[:, 0], dim=-1), found.image[:3], rtol=1e-4, atol=1e-5)


def test_tiles_of_the_raw_file_keep_its_detail(small_backbone):
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8))  # 4 times the input of 32
    raw, plain = (with_pyramid(small_backbone, 2, source=s, dtype=torch.float32) for s in ("raw", "input"))
    pixels = raw.transform(large)
    assert pixels.shape == (3, 128, 128)
    found = raw.encode(pixels[None], {"pyramid"})["pyramid"]
    # Fine tiles are pieces of the file itself; the whole is what the backbone sees anyway, up to 8-bit rounding.
    tiles = cut(pixels[None], 4)[0]
    torch.testing.assert_close(found[0, 5:], small_backbone.encode_image(tiles, normalize=False), rtol=1e-4, atol=1e-4)
    whole = small_backbone.encode_image(small_backbone.transform(large)[None], normalize=False)
    assert F.cosine_similarity(found[:, 0], whole).item() > 0.9999
    assert not torch.allclose(found[0, 5:], plain.encode(plain.transform(large)[None], {"pyramid"})["pyramid"][0, 5:])


def test_squashing_keeps_the_border(small_backbone):
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (0, 0, 32, 32))  # left of the middle crop
    cropped, squashed = (with_pyramid(small_backbone, 1, resize=r).transform(wide) for r in ("crop", "squash"))
    assert cropped.std((1, 2)).max() < 1e-3
    assert squashed[:, :, :8].mean() > squashed[:, :, 16:].mean() + 1


def test_options_are_part_of_the_fingerprint(small_backbone):
    made = [
        with_pyramid(small_backbone, *args, **options).fingerprint
        for args, options in [((2,), {}), ((1,), {}), ((2,), {"source": "raw"}), ((2,), {"resize": "squash"})]
    ]
    assert len({*made, small_backbone.fingerprint}) == 5


def test_embeddings_too_large_for_half_precision_are_refused(small_backbone, monkeypatch):
    monkeypatch.setattr(type(small_backbone), "encode_image", lambda self, x, **_: torch.full((len(x), 12), 1e6))
    with pytest.raises(UsageError, match="too large for torch"):
        with_pyramid(small_backbone).encode(torch.zeros(1, 3, 32, 32), {"pyramid"})


# ---- training


def test_scores_are_those_of_the_equations(trained, features):
    state, v = trained.state, F.normalize(features.extra["pyramid"].float(), dim=-1)
    u = torch.relu(v @ state["adapter"][0]) + v
    h1, h2 = fuse(u[:, 0], u[:, 1:5], u[:, 5:])
    texts = [state["text"] + b for b in (state["bias0"], (state["bias0"] + state["bias2"]) / 2, state["bias2"])]
    p0, p1, p2 = (patch_probabilities(h, t, tau=0.01) for h, t in zip((u[:, 0], h1, h2), texts, strict=True))
    for mean in ("paper", "kept"):
        pooled = [pool(p, keep_mask(entropy(p)), mean=mean) for p in (p1, p2)]
        _, score, predicted = combine(p0, *pooled)
        detector = copy.copy(trained).set_params(patch_mean=mean)
        torch.testing.assert_close(detector.score_features(features), score, rtol=1e-4, atol=1e-5)
        assert torch.equal(detector.predict(features), predicted)


def test_confident_images_are_told_apart_by_what_remains_to_1(trained, features, monkeypatch):
    gaps = torch.linspace(3, 80, 20)
    logits = torch.stack([gaps, torch.zeros(20), -gaps], 1)
    p = logits.softmax(1)
    assert p.amax(1).unique().numel() < 10
    for kept in (1.0, 0.75):  # the paper's mean counts dropped tiles as zeros
        mean = p * (2 + kept) / 3
        monkeypatch.setattr(type(trained), "_combined", lambda *_, mean=mean: (mean, mean.amax(1), mean.argmax(1)))
        found = trained.score_features(features)
        if kept < 1:
            assert torch.equal(found, mean.amax(1))
            continue
        remaining = logits.double().softmax(1)[:, 1:].sum(1)
        tail = 1 - 2**-10 + 2**-10 * (2**-10 / remaining).log()
        written = torch.where(remaining < 2**-10, tail, 1 - remaining)
        torch.testing.assert_close(found.double(), written, rtol=0, atol=1e-6)
        assert (found.diff() > 0).all()


def test_training_learns_the_classes(small_backbone, features):
    rng = torch.Generator().manual_seed(0)
    prototypes = torch.randn(4, 1, 12, generator=rng)[features.labels]
    clear = replace(features, extra={"pyramid": prototypes + 0.3 * torch.randn(20, 21, 12, generator=rng)})
    detector = hvl(small_backbone, epochs=60).fit(clear)
    assert detector.history[-1]["id"] < 0.3 * detector.history[0]["id"]
    assert right_predictions(detector, clear).float().mean() > 0.9
    assert [epoch["learning_rate"] for epoch in detector.history[:2]] == pytest.approx([2e-3, 1.99863e-3], rel=1e-5)


def test_images_and_their_features_train_alike(small_backbone, source, features, tmp_path):
    one, other = hvl(small_backbone).fit(features), hvl(small_backbone).fit(source, cache=tmp_path, progress=False)
    assert one.history == other.history
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_cached_half_precision_and_live_embeddings_give_the_same_logits(small_backbone, source, trained, features):
    live = with_pyramid(small_backbone, dtype=torch.float32)
    pixels = torch.stack([live.transform(source.open(i)) for i in range(len(source))])
    exact = replace(features, extra={"pyramid": live.encode(pixels, {"pyramid"})["pyramid"]})
    again = replace(features, extra={"pyramid": live.encode(pixels[5:6], {"pyramid"})["pyramid"].expand(20, -1, -1)})
    with torch.no_grad():
        cached, fresh, alone = (trained.scales(one).log_p for one in (features, exact, again))
    for a, b, c in zip(cached, fresh, alone, strict=True):
        assert (a - b).abs().max() < 0.05  # a random small encoder: tiles far closer to each other than CLIP's
        torch.testing.assert_close(b[5], c[0], rtol=1e-4, atol=1e-3)


def test_an_interrupted_training_ends_as_one_that_was_not(small_backbone, features, tmp_path):
    whole = hvl(small_backbone, epochs=4, class_balance="sampler").fit(features)
    file = tmp_path / "checkpoint.safetensors"
    detector = hvl(small_backbone, epochs=4, class_balance="sampler")
    train, epochs = detector._rows, []

    def stopping(labels, views):
        draw = train(labels, views)

        def drawn(rows, epoch):
            epochs.append(epoch)
            if epoch == 2:
                raise KeyboardInterrupt
            return draw(rows, epoch)

        return drawn

    detector._rows = stopping
    with pytest.raises(KeyboardInterrupt):
        detector.fit(features, checkpoint=file)
    resumed = hvl(small_backbone, epochs=4, class_balance="sampler").fit(features, checkpoint=file)
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)
    with pytest.raises(UsageError, match="other settings"):
        hvl(small_backbone, epochs=4, k=5, class_balance="sampler").fit(features, checkpoint=file)


def test_the_sampler_draws_rare_classes_as_often(small_backbone):
    labels = torch.tensor([0] * 90 + [1] * 10)
    draw = hvl(small_backbone, class_balance="sampler")._rows(labels, 1)
    counts = torch.stack([torch.bincount(labels[draw(torch.arange(100), e)[0]], minlength=2) for e in range(50)])
    assert abs(counts[:, 1].sum().item() - 2500) < 4 * (5000 * 0.25) ** 0.5
    plain = hvl(small_backbone)._rows(labels, 1)
    assert torch.equal(plain(torch.tensor([7, 3]), 0)[0], torch.tensor([7, 3]))


def test_views_are_drawn_per_image_and_epoch(small_backbone, source, features):
    draw = hvl(small_backbone)._rows(torch.zeros(40, dtype=torch.int64), 8)
    images, places = draw(torch.arange(40), 3)
    assert torch.equal(images, torch.arange(40))
    assert torch.equal(places % 40, images)
    assert len(set((places // 40).tolist())) == 8
    assert torch.equal(draw(torch.arange(40), 3)[1], places)
    assert not torch.equal(draw(torch.arange(40), 4)[1], places)
    turned = hvl(small_backbone, views=2).fit(source, progress=False)
    assert turned.history != hvl(small_backbone).fit(features).history


def test_the_eight_turns_are_the_symmetries_of_the_square(source):
    views = TurnedViews(source, 8)
    seen = {np.asarray(views.open(view * len(source) + 3)).tobytes() for view in range(8)}
    upright = np.asarray(source.open(3))
    every = [np.rot90(side, turns) for side in (upright, upright[:, ::-1]) for turns in range(4)]
    assert seen == {np.ascontiguousarray(one).tobytes() for one in every}
    assert np.array_equal(np.asarray(views.open(3)), upright)
    assert views.labels.tolist() == source.labels.tolist() * 8
    with pytest.raises(UsageError, match="views=4"):
        TurnedViews(source, 4)


# ---- the detector


def test_one_evaluation_with_other_detectors(trained, small_backbone, source, tmp_path):
    mcm = create_detector("mcm", backbone=small_backbone, class_names=source.label_names)
    found = evaluate(
        [trained, mcm], id=source.subset(slice(0, 10)), ood={"rest": source.subset(slice(10, 20))}, out=tmp_path
    )
    assert set(found.metrics) == {"hvl", "mcm"}
    assert 0 <= found.results["detectors"]["hvl"]["accuracy"] <= 1


def test_both_means_from_one_training(trained, features):
    variants = trained.variants()
    assert list(variants) == ["hvl", "hvl_kept"]
    kept = variants["hvl_kept"].score_features(features)
    assert (kept >= trained.score_features(features) - 1e-6).all()
    assert trained.patch_mean == "paper"
    assert list(variants["hvl_kept"].variants()) == ["hvl", "hvl_paper"]


def test_another_partition_takes_another_pyramid(trained, source):
    one = trained.set_params(n=1)
    assert not one.fitted
    assert one.fit(source, progress=False).score(source).shape == (20,)
    assert one.backbone.encode(torch.zeros(1, 3, 32, 32), {"pyramid"})["pyramid"].shape[1] == 6


def test_texts_of_any_norm(small_backbone, features, source):
    raw = hvl(small_backbone, normalize_t=False, class_names=source.label_names).fit(features)
    prompts = [f"a photo of a {name}" for name in source.label_names]
    torch.testing.assert_close(raw.state["text"], small_backbone.encode_text(prompts, normalize=False))
    unit = hvl(small_backbone, class_names=source.label_names).fit(features)
    torch.testing.assert_close(unit.state["text"], small_backbone.encode_text(prompts))


def test_constant_images_keep_every_tile(small_backbone, trained):
    grey = extract(with_pyramid(small_backbone), [Image.new("RGB", (50, 50), "grey")], {"pyramid"})
    scales = trained.scales(grey)
    assert bool(scales.keep1.all())
    assert bool(scales.keep2.all())
    assert 0 < trained.score_features(grey).item() <= 1


def test_images_smaller_than_a_tile_are_scored(trained):
    scores = trained.score([Image.new("RGB", size, "red") for size in ((1, 1), (3, 200), (500, 2))])
    assert scores.isfinite().all()


# ---- mistakes


def test_features_of_another_pyramid_or_backbone_are_refused(small_backbone, trained, source, features):
    other = extract(with_pyramid(small_backbone, 1), source, {"pyramid"})
    with pytest.raises(UsageError, match=r"n=2 reads 21 tiles per image; these features are of shape \[20, 6, 12\]"):
        trained.score_features(other)
    with pytest.raises(UsageError, match="n=1 reads 6 tiles"):
        hvl(small_backbone, n=1).fit(features)
    with pytest.raises(UsageError, match="Extract them again"):
        trained.score_features(replace(features, fingerprint="another"))
    with pytest.raises(UsageError, match="'pyramid'"):
        trained.score_features(extract(small_backbone, source, {"image"}))
    with pytest.raises(UsageError, match=r"pyramid n=2 .* needs a pyramid n=1"):
        hvl(trained.backbone, n=1)


def test_a_class_without_images_and_one_with_a_single_image(small_backbone, features, caplog):
    with pytest.raises(DataError, match=r"No training image is of \['wart'\]"):
        hvl(small_backbone, class_names=[*features.label_names, "wart"]).fit(features)
    with caplog.at_level(logging.WARNING):
        hvl(small_backbone).fit(features[[0, *range(5, 20)]])
    assert "one training image only" in caplog.text
    assert features.label_names[0] in caplog.text


def test_before_the_fit_and_without_backbone(small_backbone, features):
    with pytest.raises(NotFittedError, match="two classes"):
        hvl(small_backbone).score_features(features)
    with pytest.raises(UsageError, match="backbone"):
        HVL().fit(features)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 1, "k": 5}, r"k=5 .*4 fine tiles at n=1"),
        ({"tau": -1.0}, "tau=-1"),
        ({"patch_mean": "median"}, "patch_mean='median'"),
        ({"views": 3}, "views=3"),
        ({"class_balance": "loss"}, "class_balance='loss'"),
        ({"ood_weight": float("nan")}, "ood_weight=nan"),
        ({"pyramid_source": "file"}, "pyramid_source='file'"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        HVL(**options)
