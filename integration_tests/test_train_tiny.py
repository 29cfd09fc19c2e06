"""The script that trains the embedded backbone, on a miniature pack: resuming, continuing, exporting."""

import importlib.util
import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.tiny import ByteTokenizer, TinyConfig, load_model
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "tools" / "train_tiny.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


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
def recipe(script):
    return script.Recipe(samples=64, batch=16, small=16, texts=4, scenes_per_class=1)


def weights(training):
    states = training.model.state_dict() | training.averaged.state_dict()
    return {name: value.clone() for name, value in states.items()}


def test_a_resumed_run_ends_bit_identical(script, packs, recipe, tmp_path):
    whole = script.Training(packs, tmp_path / "whole", "cpu", recipe)
    whole.run(None, save_every=1e9)
    script.Training(packs, tmp_path / "parts", "cpu", recipe).run(2, save_every=1e9)
    log = tmp_path / "parts" / "log.csv"
    log.write_text("step,image_loss\n1,5.0\n2,4.0\n3,3.0\n")
    resumed = script.Training(packs, tmp_path / "parts", "cpu", recipe)
    assert resumed.step == 2
    assert log.read_text() == "step,image_loss\n1,5.0\n2,4.0\n"  # the third step is run again
    resumed.run(None, save_every=1e9)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_of_another_recipe_is_refused(script, packs, recipe, tmp_path):
    script.Training(packs, tmp_path, "cpu", recipe).run(1, save_every=1e9)
    with pytest.raises(SystemExit, match="another recipe"):
        script.Training(packs, tmp_path, "cpu", replace(recipe, seed=5))


def test_the_learning_rate_rises_stays_and_falls_to_zero(script):
    recipe = script.Recipe(samples=100 * 128, warmup=10, steady=0.2)
    factors = [script.learning_rate_factor(step, recipe) for step in range(recipe.steps)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(factors[9:20]) == {1.0}
    assert factors[20:] == pytest.approx([step / 80 for step in range(80, 0, -1)])


def test_exported_weights_are_the_trained_function_and_a_run_continues_from_them(script, packs, recipe, tmp_path):
    first = script.Training(packs, tmp_path / "first", "cpu", recipe)
    first.run(None, save_every=1e9)
    history = {"val_looks": 1, "runs": []}
    script.export(first.model, TinyConfig(), tmp_path / "out", history)
    backbone = OpenCLIPBackbone(
        load_model(tmp_path / "out"), ByteTokenizer(), ImageTransform(crop=(64, 64), resize=64), spec="out"
    )
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image, local = script.image_features(first.model.eval().clip.visual, x)
        text = script.class_text(first.model, first.names[:3])
    torch.testing.assert_close(backbone.encode_dense(x), (image, local), rtol=0, atol=5e-3)  # half precision
    torch.testing.assert_close(
        backbone.encode_text([f"a photo of a {n}" for n in first.names[:3]]), text, atol=5e-3, rtol=0
    )

    start = tmp_path / "out" / "model.safetensors"
    second = script.Training(packs, tmp_path / "second", "cpu", replace(recipe, seed=1, start="first"), start)
    with torch.no_grad():
        again = script.image_features(second.model.eval().clip.visual, x)
    torch.testing.assert_close(again, backbone.encode_dense(x), rtol=1e-4, atol=1e-5)


def test_a_patch_is_of_what_covers_it_and_for_the_rest_of_every_class_alike(script):
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :4] = 1  # the upper half
    masks[0, 1, 4:, :4] = 1  # the lower left quarter
    of_image, of_patches = script.class_shares(torch.tensor([[2, 0]]), masks, side=2, classes=4)
    torch.testing.assert_close(of_image, torch.tensor([[1 / 3, 0, 2 / 3, 0]]))
    expected = torch.stack([torch.eye(4)[2], torch.eye(4)[2], torch.eye(4)[0], torch.full((4,), 0.25)])
    assert torch.equal(of_patches[0], expected)


def test_a_mosaic_has_four_photographs_where_its_masks_say(script):
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    joined, labels, masks = script.mosaics(x, torch.arange(8))
    assert labels.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert joined[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal((masks * labels[:, :, None, None]).sum(1), joined[:, 0])


def test_a_pasted_object_hides_the_one_behind_it(script):
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    objects = torch.zeros(2, 4, 4)
    objects[0, :2] = 1  # the upper half of the first, everything of the second
    objects[1] = 1
    pasted, labels, masks = script.paste(x, torch.tensor([7, 9]), objects, share=0.5)
    assert pasted[0, 0].tolist() == [[1.0] * 4] * 2 + [[2.0] * 4] * 2
    assert torch.equal(pasted[1], x[1])  # only half of the scenes are pasted
    assert labels.tolist() == [[7, 9], [9, 7]]
    assert masks.sum((2, 3)).tolist() == [[8, 8], [16, 0]]


def test_only_the_best_patches_have_to_show_the_class(script):
    logits = torch.zeros(1, 4, 2)
    logits[0, 0, 1] = 50.0
    assert script.best_patches_loss(logits, torch.tensor([1]), 0.25).item() == pytest.approx(0, abs=1e-6)
    assert script.best_patches_loss(logits, torch.tensor([1]), 0.5).item() == pytest.approx(math.log(2) / 2)


def test_the_exported_average_follows_the_weights_at_its_decay(script, packs, recipe, tmp_path):
    training = script.Training(packs, tmp_path, "cpu", replace(recipe, average=0.75))
    training.train_step()
    first = training.model.classes.detach().clone()
    training.train_step()
    torch.testing.assert_close(training.averaged.module.classes, 0.75 * first + 0.25 * training.model.classes)


def test_the_demo_s_near_classes_are_not_trained_on(script):
    assert len(script.SCENE_NAMES) == 56
    assert not set(script.SCENE_NAMES) & set(script.scenes.NEAR_OOD_CLASSES)


def test_masks_are_cut_with_their_images(script, recipe):
    rng = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 64, 64, generator=rng) > 0.5
    images = torch.cat([torch.zeros(3, 3, 64, 64), 255.0 * masks[:, None].expand(2, 3, 64, 64)])
    x, objects = script.augment(images, masks, 64, 0, replace(recipe, jitter=0.0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (script.MEAN, script.STD))
    torch.testing.assert_close((x * std + mean)[3:, 0], objects, atol=1e-5, rtol=0)


def test_the_card_names_every_run_and_figure(script):
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
    card = script.model_card(
        {"val_looks": 3, "runs": [run, run | {"samples": 2000}]},
        {"photographs": {"image": 0.512, "single_patch": 0.42, "mean_of_patches": 0.5}},
        {"mcm": {"near": 0.71, "far": 0.652}},
    )
    for text in (
        "1,000 images",
        "2,000 images",
        "constant for 15 %, then linearly to 0",
        "3 times",
        "24 photographs",
        "| photographs | 51.2 | 42.0 | 50.0 |",
        "| mcm | 71.0 | 65.2 |",
    ):
        assert text in card
