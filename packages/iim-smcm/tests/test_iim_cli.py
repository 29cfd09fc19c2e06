"""The commands from fit to reproduce, on miniature image folders, in one process."""

import json
import sys

import numpy as np
import pytest
import torch
from ood_core.data import scenes
from ood_iim import commands, plot
from ood_iim.cli import main
from ood_iim.commands import _published
from ood_iim.studies import STUDIES
from PIL import Image

KINDS = ("positive", "negative")
QUICK = ["--dtype", "float32", "--param", "epochs=1", "--param", "negative_prompts=2"]
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]


def images(folder, count, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("train", 1), ("test", 2)):
        scenes.write_folder(scenes.render(scenes.ID_CLASSES[:3], 8, seed=seed), root / name)
    scenes.write_folder(scenes.textures(12), root / "ood")
    return root


@pytest.fixture(scope="module")
def detector(data):
    out = data / "detector"
    code = main(["fit", f"{data}/train", "--out", str(out), "--shots", "4", "--calibrate", f"{data}/test", *QUICK])
    assert code == 0
    return out


def test_fit_saves_a_calibrated_detector_and_no_checkpoint(detector):
    assert {path.name for path in detector.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    config = json.loads((detector / "config.json").read_text())
    assert config["threshold"] is not None
    assert config["class_names"] == sorted(scenes.ID_CLASSES[:3])
    assert len(json.loads((detector / "training.json").read_text())) == 1


def test_score(detector, data, capsys):
    assert main(["score", f"{data}/ood", "--detector", str(detector), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 12
    assert {"id", "iim", "iim.ood", "iim.p_value"} <= set(rows[0])


def test_evaluate_judges_all_six_scores(detector, data, tmp_path, capsys):
    arguments = ["--detector", str(detector), "--id", f"{data}/test", "--ood", f"textures={data}/ood"]
    assert main(["evaluate", *arguments, "--out", str(tmp_path), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results["detectors"]) == ["mcm", "gl_mcm", "r_mcm*", "r_mcm", "s_mcm*", "s_mcm"]
    assert 0 <= results["detectors"]["s_mcm"]["accuracy"] <= 1
    assert {"results.json", "scores.parquet", "report.html"} <= {path.name for path in tmp_path.iterdir()}


def test_explain(detector, data, tmp_path, capsys):
    image = next((data / "test").rglob("*.png"))
    out = tmp_path / "why.png"
    assert main(["explain", str(image), "--detector", str(detector), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] in scenes.ID_CLASSES
    with Image.open(out) as picture:
        assert picture.width > 600


def test_sweep_prints_test_figures_or_chooses_on_validation_images(detector, data, capsys):
    arguments = ["sweep", "--detector", str(detector), "--id", f"{data}/test", "--json", "--k", "1", "4", "16"]
    assert main([*arguments, "--ood", f"textures={data}/ood"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert len(rows) == 3 * 4 * 2
    assert "declare some with --validation" in captured.err
    assert main([*arguments, "--ood", f"textures={data}/ood", "--validation", f"{data}/ood"]) == 0
    (chosen,) = json.loads(capsys.readouterr().out)
    assert chosen["validation"]["auroc"] == max(row["per_set"]["textures"]["auroc"] for row in rows)
    assert set(chosen["per_set"]) == {"textures"}
    assert main(arguments) == 2
    assert "--validation SOURCE" in capsys.readouterr().err


def test_import(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\n")
    state = {
        "prompt_learner.local_ctx": torch.randn(2, 16, 192),
        "prompt_learner.neg_ctx": torch.randn(5, 16, 192),
        "text_encoder.text_projection": torch.randn(192, 192),
        "image_encoder.other": torch.zeros(3),
    }
    torch.save({"state_dict": state, "epoch": 50}, tmp_path / "model.pth.tar-50")
    arguments = ["import", str(tmp_path / "model.pth.tar-50"), "--classes", str(names), "--backbone", "tiny"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "5 negative prompts" in capsys.readouterr().err
    names.write_text("dog\ncat\nowl\n")
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 2
    assert "but 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fit", "{data}/nothing", "--out", "{tmp}/x"], 3, "There is no"),
        (["fit", "{data}/ood", "--out", "{tmp}/x", *QUICK], 2, "at least two classes"),
        (["fit", "{data}/train", "--out", "{tmp}/x", "--param", "lambda=3"], 2, "option of 'iim' 'lambda'"),
        (["fit", "{data}/train", "--out", "{tmp}/x", "--param", "train_k=33", *QUICK], 2, "train_k=33"),
        (["fit", "{data}/train", "--out", "{tmp}/x", "--backbone", "timm:vit_tiny_patch16_224"], 2, "has no 'prompts'"),
        (["explain", "{data}/none.png", "--detector", "{detector}"], 3, "There is no image"),
        (["evaluate", "--detector", "{data}", "--id", "x", "--ood", "y", "--out", "{tmp}"], 3, "no saved detector"),
        (["reproduce", "--root", "{data}", "--study", "loses"], 2, "Did you mean 'losses'"),
        (["reproduce", "--root", "{data}", "--protocol", "imagenet"], 2, "Unknown protocol 'imagenet'"),
    ],
)
def test_mistakes_are_one_sentence(arguments, code, words, data, detector, tmp_path, capsys):
    filled = [one.format(data=data, tmp=tmp_path, detector=detector) for one in arguments]
    assert main(filled) == code
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Four classes as the official code expects them, and the four OOD sets."""
    root = tmp_path_factory.mktemp("imagenet")
    for number, wnid in enumerate(WNIDS):
        images(root / "imagenet" / "train" / wnid, 3, number)
        images(root / "imagenet" / "val" / wnid, 2, 10 + number)
    for number, folder in enumerate(("iNaturalist", "SUN", "Places", "dtd/images/dotted")):
        images(root / folder, 3, 20 + number)
    (root / "imagenet" / "classnames.txt").write_text("".join(f"{w} fish {i}\n" for i, w in enumerate(WNIDS)))
    return root


def test_reproduce_prints_our_table_beside_the_papers(imagenet, tmp_path, capsys):
    arguments = ["reproduce", "--root", str(imagenet), "--backbone", "tiny", "--shots", "2", "--seeds", "1", "2"]
    arguments += ["--out", str(tmp_path), *QUICK]
    assert main([*arguments, "--dry-run"]) == 0
    assert "12 of 1,281,167" in capsys.readouterr().out
    assert main([*arguments, "--json", "--shots", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = found["results"]["4 shots"]
    assert set(scores["s_mcm"]) == {"average", "iNaturalist", "SUN", "Places", "Texture", "accuracy"}
    assert [row["method"] for row in found["published"]][:3] == ["MCM", "GL-MCM", "R-MCM*"]
    written = sorted(path for path in tmp_path.rglob("trial.json"))
    assert len(written) == 2
    before = [path.stat().st_mtime_ns for path in written]
    assert main([*arguments, "--shots", "4"]) == 0  # finished runs are read back
    assert [path.stat().st_mtime_ns for path in written] == before
    captured = capsys.readouterr()
    assert "published" in captured.out
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("study", STUDIES)
def test_studies_run_to_the_printed_table(study, imagenet, tmp_path, capsys, monkeypatch):
    chosen = {next(iter(STUDIES[study])), "C_n=300"}
    few = {label: options for label, options in STUDIES[study].items() if label in chosen}
    small = {label: {**options, "negative_prompts": 2, "train_k": 2} for label, options in few.items()}
    monkeypatch.setitem(STUDIES, study, small)
    arguments = ["reproduce", "--root", str(imagenet), "--backbone", "tiny", "--shots", "2", "--seeds", "1"]
    arguments += ["--study", study, "--out", str(tmp_path), "--dtype", "float32", "--param", "epochs=1"]
    assert main(arguments) == 0
    assert "FPR95 / AUROC" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("trial.json"))) == len(small)


def test_mined_patches_are_drawn_once_each(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    kept = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: kept.append(figure))
    rows = [{"x": float(i), "y": float(i % 7), "class": f"c{i % 11}", "kind": KINDS[i % 2]} for i in range(60)]
    plot.draw_local_map(rows, tmp_path / "map.png")
    (axis,) = kept[0].axes
    drawn = sorted(tuple(place) for dots in axis.collections for place in dots.get_offsets().tolist())
    assert drawn == [(row["x"], row["y"]) for row in rows]
    labels = {dots.get_label() for dots in axis.collections if not dots.get_label().startswith("_")}
    assert labels == {*(f"c{i}" for i in range(8)), "other classes"}


def test_without_matplotlib_the_map_is_kept_as_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    commands._keep_local_map([{"x": 0.0, "y": 1.0, "class": "a", "kind": "positive"}], tmp_path)
    assert "pip install 'ood-iim[plot]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["local_map.json"]


def test_table_2_stands_beside_the_study_of_the_losses():
    rows = _published("losses", "ImageNet-500-Hard", [4])
    assert len(rows) == len(STUDIES["losses"])
    assert rows[-1]["average"] == {"fpr95": 27.81, "auroc": 93.55}
    assert _published("losses", "ImageNet-1k", [4]) == _published("losses", "ImageNet-500-Hard", [16]) == []
    assert _published("k", "ImageNet-500-Hard", [4]) == []
