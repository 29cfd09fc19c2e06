"""The script that trains the embedded backbone, on a miniature pack: resuming, continuing, exporting."""

import io
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from measure_tiny import right_by_rank
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import scenes
from ood_core.tiny import ByteTokenizer, load_model
from ood_core.tiny.model import MEAN, STD
from PIL import Image
from tiny.data import augment, mosaics, paste
from tiny.export import exportable, model_card, write_weights
from tiny.losses import best_patches_loss, class_shares
from tiny.model import image_features, text_features
from tiny.recipe import SCENE_NAMES, TEMPLATES, Recipe, learning_rate_factor
from train_tiny import Training


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Three classes of four pictures in each of the two files."""
    folder = tmp_path_factory.mktemp("packs")
    rng = np.random.default_rng(0)
    for file in ("tiny-imagenet.parquet", "tiny-imagenet-more.parquet"):
        rows = []
        for label in range(3):
            for _ in range(4):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "png")
                name = f"thing {label}"
                rows.append({"image": buffer.getvalue(), "label": f"n{label}", "split": "train", "name": name})
        pq.write_table(pa.Table.from_pylist(rows), folder / file)
    return folder


@pytest.fixture(scope="module")
def recipe():
    return Recipe(samples=64, batch=16, small=16, texts=4, scenes_per_class=1)


def weights(training):
    states = training.model.state_dict() | training.averaged.state_dict()
    return {name: value.clone() for name, value in states.items()}


def test_a_resumed_run_ends_bit_identical(packs, recipe, tmp_path):
    whole = Training(packs, tmp_path / "whole", "cpu", recipe)
    whole.run(None, save_every=1e9)
    Training(packs, tmp_path / "parts", "cpu", recipe).run(2, save_every=1e9)
    log = tmp_path / "parts" / "log.csv"
    log.write_text("step,image_loss\n1,5.0\n2,4.0\n3,3.0\n")
    resumed = Training(packs, tmp_path / "parts", "cpu", recipe)
    assert resumed.step == 2
    assert log.read_text() == "step,image_loss\n1,5.0\n2,4.0\n"  # the third step is run again
    resumed.run(None, save_every=1e9)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_of_another_recipe_is_refused(packs, recipe, tmp_path):
    Training(packs, tmp_path, "cpu", recipe).run(1, save_every=1e9)
    with pytest.raises(SystemExit, match="another recipe"):
        Training(packs, tmp_path, "cpu", replace(recipe, seed=5))


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    recipe = Recipe(samples=100 * 128, warmup=10, steady=0.2)
    factors = [learning_rate_factor(step, recipe) for step in range(recipe.steps)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(factors[9:20]) == {1.0}
    assert factors[20:] == pytest.approx([step / 80 for step in range(80, 0, -1)])


def test_exported_weights_are_the_trained_function_and_a_run_continues_from_them(packs, recipe, tmp_path):
    first = Training(packs, tmp_path / "first", "cpu", recipe)
    first.run(None, save_every=1e9)
    history = {"val_looks": 1, "runs": []}
    write_weights(exportable(first.model), tmp_path / "out", history)
    backbone = OpenCLIPBackbone(
        load_model(tmp_path / "out"), ByteTokenizer(), ImageTransform(crop=(64, 64), resize=64), spec="out"
    )
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image, local = image_features(first.model.eval().clip.visual, x)
        text = text_features(first.model.clip, ByteTokenizer()([TEMPLATES[0].format(n) for n in first.names[:3]]))
    torch.testing.assert_close(backbone.encode_dense(x), (image, local), rtol=0, atol=5e-3)  # half precision
    torch.testing.assert_close(
        backbone.encode_text([f"a photo of a {n}" for n in first.names[:3]]), text, atol=5e-3, rtol=0
    )

    start = tmp_path / "out" / "model.safetensors"
    second = Training(packs, tmp_path / "second", "cpu", replace(recipe, seed=1, start="first"), start)
    with torch.no_grad():
        again = image_features(second.model.eval().clip.visual, x)
    torch.testing.assert_close(again, backbone.encode_dense(x), rtol=1e-4, atol=1e-5)


def test_a_patch_is_of_what_covers_it_and_for_the_rest_of_every_class_alike():
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :4] = 1  # the upper half
    masks[0, 1, 4:, :4] = 1  # the lower left quarter
    of_image, of_patches = class_shares(torch.tensor([[2, 0]]), masks, side=2, classes=4)
    torch.testing.assert_close(of_image, torch.tensor([[1 / 3, 0, 2 / 3, 0]]))
    expected = torch.stack([torch.eye(4)[2], torch.eye(4)[2], torch.eye(4)[0], torch.full((4,), 0.25)])
    assert torch.equal(of_patches[0], expected)


def test_a_mosaic_has_four_photographs_where_its_masks_say():
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    joined, labels, masks = mosaics(x, torch.arange(8))
    assert labels.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert joined[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal((masks * labels[:, :, None, None]).sum(1), joined[:, 0])


def test_a_pasted_object_hides_the_one_behind_it():
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    objects = torch.zeros(2, 4, 4)
    objects[0, :2] = 1  # the upper half of the first, everything of the second
    objects[1] = 1
    pasted, labels, masks = paste(x, torch.tensor([7, 9]), objects, share=0.5)
    assert pasted[0, 0].tolist() == [[1.0] * 4] * 2 + [[2.0] * 4] * 2
    assert torch.equal(pasted[1], x[1])  # only half of the scenes are pasted
    assert labels.tolist() == [[7, 9], [9, 7]]
    assert masks.sum((2, 3)).tolist() == [[8, 8], [16, 0]]


def test_only_the_best_patches_have_to_show_the_class():
    logits = torch.zeros(1, 4, 2)
    logits[0, 0, 1] = 50.0
    assert best_patches_loss(logits, torch.tensor([1]), 0.25).item() == pytest.approx(0, abs=1e-6)
    assert best_patches_loss(logits, torch.tensor([1]), 0.5).item() == pytest.approx(math.log(2) / 2)


def test_the_exported_average_follows_the_weights_at_its_decay(packs, recipe, tmp_path):
    training = Training(packs, tmp_path, "cpu", replace(recipe, average=0.75))
    training.train_step()
    first = training.model.classes.detach().clone()
    training.train_step()
    torch.testing.assert_close(training.averaged.module.classes, 0.75 * first + 0.25 * training.model.classes)


def test_the_demo_s_near_classes_are_not_trained_on():
    assert len(SCENE_NAMES) == 56
    assert not set(SCENE_NAMES) & set(scenes.NEAR_OOD_CLASSES)


def test_masks_are_cut_with_their_images(recipe):
    rng = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 64, 64, generator=rng) > 0.5
    images = torch.cat([torch.zeros(3, 3, 64, 64), 255.0 * masks[:, None].expand(2, 3, 64, 64)])
    x, objects = augment(images, masks, 64, 0, replace(recipe, jitter=0.0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close((x * std + mean)[3:, 0], objects, atol=1e-5, rtol=0)


def test_the_card_names_every_run_and_figure():
    run = {"samples": 1000, "small": 48, "small_share": 0.6, "muon_lr": 0.02, "adamw_lr": 0.0015, "weight_decay": 0.2}
    run |= {
        "seed": 0,
        "schedule": "constant for 15 %, then linearly to 0",
        "hours": 0.5,
        "hardware": "a processor",
        "dtype": "float32",
        "torch": "2",
        "date": "2026-01-01",
        "photographs": 24,
    }
    card = model_card(
        {"val_looks": 3, "runs": [run, run | {"samples": 2000}]},
        {
            "top1": {"photographs": {"image": 0.512, "single_patch": 0.42, "mean_of_patches": 0.5}},
            "right_by_rank": {"1-16": 0.6, "17-32": 0.4, "33-64": 0.2},
            "scenes": {"of 8": {"on": 0.9, "off": 0.11}},
            "auroc": {"mcm": {"near": 0.71, "far": 0.652}},
        },
    )
    for text in (
        "1,000 images",
        "2,000 images",
        "constant for 15 %, then linearly to 0",
        "3 times",
        "24 photographs",
        "| photographs | 51.2 | 42.0 | 50.0 |",
        "| photographs | 60.0 | 40.0 | 20.0 |",
        "| of 8 | 90.0 | 11.0 |",
        "| mcm | 71.0 | 65.2 |",
    ):
        assert text in card


def test_patches_are_ranked_by_their_cosine_to_the_own_class():
    text = torch.eye(2)
    angles = torch.linspace(0, math.pi / 2, 64)  # from the own class to the other: right in the first half
    local = torch.stack([angles.cos(), angles.sin()], 1)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert right_by_rank(local[None], text, torch.tensor([0])) == {"1-16": 1.0, "17-32": 1.0, "33-64": 0.0}


def test_a_distilled_run_resumes_too_and_learns_from_the_shipped_weights(packs, recipe, tmp_path):
    recipe = replace(recipe, distill_weight=1.0)
    whole = Training(packs, tmp_path / "whole", "cpu", recipe)
    losses = whole.train_step()
    assert losses["distill_loss"] > 0
    whole.run(2, save_every=1e9)
    Training(packs, tmp_path / "parts", "cpu", recipe).run(1, save_every=1e9)
    resumed = Training(packs, tmp_path / "parts", "cpu", recipe)
    resumed.run(2, save_every=1e9)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
