"""The commands from fit to reproduce, on miniature image folders, in one process."""

import argparse
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ood_core import create_backbone
from ood_core.data import scenes
from ood_core.prompts import text_features
from ood_iim import plot, reproduce
from ood_iim.cli import main
from ood_iim.prototypes import imagenet_halves, prototypes
from ood_iim.reproduce import _compared, _published
from ood_iim.studies import STUDIES, within_grid
from PIL import Image

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
        (["reproduce"], 2, "Give --root DIR"),
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
    assert {one["row"] for one in found["differences"]} == {"4 shots"}
    assert len(found["differences"]) == 2 * 5
    (average,) = (one for one in found["differences"] if (one["place"], one["measure"]) == ("average", "fpr95"))
    assert average["published"] == 23.17
    assert average["ours"] == pytest.approx(100 * scores["s_mcm"]["average"]["fpr95"][0])
    assert found["zero_shot_accuracy"] == {}  # nothing is published of these weights
    written = sorted(path for path in tmp_path.rglob("trial.json"))
    assert len(written) == 2
    before = [path.stat().st_mtime_ns for path in written]
    assert main([*arguments, "--shots", "4"]) == 0  # finished runs are read back
    assert [path.stat().st_mtime_ns for path in written] == before
    captured = capsys.readouterr()
    assert "published" in captured.out
    assert "ours - published, points" in captured.out
    assert "(marked !)" in captured.err
    assert "Traceback" not in captured.err


@pytest.fixture
def arguments(imagenet, tmp_path):
    given = ["reproduce", "--root", str(imagenet), "--backbone", "tiny", "--shots", "2", "--seeds", "1"]
    return [*given, "--out", str(tmp_path / "out"), "--dtype", "float32", "--workers", "0", "--param", "epochs=1"]


FEW = ["--param", "negative_prompts=2"]


def test_what_a_kept_run_rests_on_is_told_where_it_differs(arguments, imagenet, tmp_path, capsys):
    assert main([*arguments, *FEW]) == 0
    table = capsys.readouterr().out
    images(tmp_path / "other", 3, 99)
    names = tmp_path / "names.txt"
    names.write_text("cod\nray\neel\ntuna\n")
    for changed, told in (
        (["--template", "no {}"], 'template was null, is "no {}"'),
        (["--set", f"SUN={tmp_path / 'other'}"], f"images.SUN was {imagenet}/SUN (3 images, "),
        (["--classes", str(names)], "class_names.sha256 was"),
        (["--param", "lambda_neg=2"], "options.lambda_neg was 5.0, is 2.0"),
        (["--dtype", "bfloat16"], 'backbone.dtype was "float32", is "bfloat16"'),
    ):
        assert main([*arguments, *FEW, *changed]) == 2
        captured = capsys.readouterr()
        assert told in captured.err
        assert captured.out == ""
    shutil.copytree(imagenet / "SUN", tmp_path / "copy", copy_function=shutil.copy)
    assert main([*arguments, *FEW, "--set", f"SUN={tmp_path / 'copy'}"]) == 0
    assert capsys.readouterr().out == table


def test_main_table_and_sweeps_follow_one_rule_that_is_named(arguments, capsys, monkeypatch):
    monkeypatch.setitem(STUDIES, "weights", {"C_n=300": {}})
    assert main([*arguments, *FEW, "--study", "weights", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["convention"] == "released"
    (name,) = found["results"]
    swept = {row["alpha"]: row for row in found["study"][name]}
    assert sorted(swept) == [0.0, 0.5, 1.0, 1.5]
    for measure in ("fpr95", "auroc"):
        own = found["results"][name]["s_mcm"]["average"][measure][0]
        assert swept[1.0][measure] == pytest.approx(own, abs=1e-9)
    assert main([*arguments, *FEW, "--study", "weights"]) == 0  # from what is kept
    out = capsys.readouterr().out
    assert "rule of FPR95: released" in out
    assert "FPR95 (released)" in out


@pytest.mark.parametrize("study", ["losses", "k", "weights", "scores"])
def test_studies_run_to_the_printed_table(study, arguments, tmp_path, capsys, monkeypatch):
    chosen = {*list(STUDIES[study])[:2], "C_n=300", "train_k=90"}
    few = {label: options for label, options in STUDIES[study].items() if label in chosen}
    monkeypatch.setitem(
        STUDIES, study, {k: {**v, "negative_prompts": min(2, v.get("negative_prompts", 2))} for k, v in few.items()}
    )
    assert main([*arguments, "--study", study]) == 0
    assert "FPR95 / AUROC" in capsys.readouterr().out
    trials = [json.loads(file.read_text()) for file in tmp_path.rglob("trial.json")]
    assert len(trials) == len(few)
    if study == "k":  # 8 x 8 patches, and as many behind the best ones
        assert sorted(one["recipe"]["options"]["train_k"] for one in trials) == [1, 5, 32]


def test_rows_of_the_k_study_follow_the_grid():
    def rows(patches, **options):
        return list(within_grid({label: own | options for label, own in STUDIES["k"].items()}, patches))

    assert rows(196) == rows(256) == list(STUDIES["k"])
    assert rows(64) == ["train_k=1", "train_k=5", "train_k=10", "train_k=20", "train_k=32"]
    assert rows(49) == ["train_k=1", "train_k=5", "train_k=10", "train_k=20", "train_k=24"]
    assert rows(64, lambda_neg=0.0)[-1] == "train_k=64"
    assert rows(64, region="all")[-1] == "train_k=63"


def test_what_a_study_varies_is_not_overridden(arguments, tmp_path, capsys, monkeypatch):
    losses = {label: STUDIES["losses"][label] for label in ("L_pos", "all")}
    monkeypatch.setitem(STUDIES, "losses", losses)
    assert main([*arguments, "--study", "losses", *FEW]) == 0
    assert "negative_prompts=2 holds in all; the study itself sets it in L_pos." in capsys.readouterr().err
    trials = [json.loads(file.read_text())["recipe"]["options"] for file in tmp_path.rglob("trial.json")]
    assert sorted(one["negative_prompts"] for one in trials) == [0, 2]
    assert main([*arguments, "--study", "k", "--param", "train_k=3"]) == 2
    assert "train_k=3 would count nowhere" in capsys.readouterr().err
    assert main([*arguments, "--param", "lambda=3"]) == 2
    assert "option of 'iim' 'lambda'" in capsys.readouterr().err


def test_the_preset_of_imagenet_100_holds_in_studies(monkeypatch):
    monkeypatch.setattr(reproduce, "message", lambda text: None)

    def settings(protocol, *given):
        args = argparse.Namespace(study="losses", protocol=protocol, param=list(given))
        return reproduce._settings(args, None)

    for protocol, scale, negatives in (("imagenet-100", 0.65, "ignore"), ("imagenet-1k", None, None)):
        rows = settings(protocol)
        assert list(rows) == list(STUDIES["losses"])
        assert {row.get("crop_scale") for row in rows.values()} == {scale}
        assert {row.get("negatives") for row in rows.values()} == {negatives}
    assert {row["crop_scale"] for row in settings("imagenet-100", "crop_scale=0.5").values()} == {0.5}


def test_features_of_test_images_are_kept_for_the_next_trial(arguments, tmp_path, capsys, monkeypatch):
    assert main([*arguments, *FEW]) == 0
    assert f"kept in {tmp_path}/out/features (0.0 GB)" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*.safetensors")}
    assert len(kept) == 5
    assert main([*arguments, *FEW, "--seeds", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*.safetensors")} == kept
    assert main([*arguments, *FEW, "--seeds", "3", "--no-cache"]) == 0
    assert "kept in" not in capsys.readouterr().err.split("2:")[-1]
    monkeypatch.setattr("ood_iim.reproduce.disk_usage", lambda folder: SimpleNamespace(free=10))
    assert main([*arguments, *FEW, "--seeds", "4"]) == 0
    assert "too much for its disk" in capsys.readouterr().err


def test_prototypes_of_two_lists(tmp_path, capsys):
    easy, hard = tmp_path / "easy.txt", tmp_path / "hard.txt"
    easy.write_text("dog\ncar\nhouse\nriver\n")
    hard.write_text("striped star\ndotted star\nstriped ring\n")
    given = ["reproduce", "--study", "prototypes", "--backbone", "tiny", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*given, "--lists", f"easy={easy}", f"hard={hard}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    texts = text_features(
        create_backbone("tiny", dtype="float32"), ["dog", "car", "house", "river"], "a photo of a {}."
    )
    pairs = [float(texts[i] @ texts[j]) for i in range(4) for j in range(i + 1, 4)]
    assert found["easy"]["similarities"] == pytest.approx(pairs, abs=1e-6)
    assert found["easy"]["mean"] == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert found["easy"]["quantiles"]["1"] == pytest.approx(max(pairs), abs=1e-6)
    assert len(found["hard"]["similarities"]) == 3
    assert [place["class"] for place in found["hard"]["map"]] == ["striped star", "dotted star", "striped ring"]
    assert json.loads((tmp_path / "prototypes" / "prototypes.json").read_text()) == found
    assert main([*given, "--lists", f"easy={easy}", f"hard={hard}"]) == 0
    assert "cosine of pairs" in capsys.readouterr().out
    hard.write_text("star\n")
    assert main([*given, "--lists", f"hard={hard}"]) == 2
    assert "List 'hard' has 1 classes" in capsys.readouterr().err


def test_prototypes_are_drawn_once_each(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    kept = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: kept.append(figure))
    found = prototypes(create_backbone("tiny"), {"a": ["dog", "car"], "b": ["cat", "bus", "tree"]})
    plot.draw_prototypes(found, tmp_path / "map.png")
    left, right = kept[0].axes
    drawn = [dots.get_offsets().tolist() for dots in right.collections]
    assert drawn == [[[place["x"], place["y"]] for place in one["map"]] for one in found.values()]
    assert {text.get_text() for text in kept[0].legends[0].get_texts()} == {"a (2 classes)", "b (3 classes)"}
    assert len(left.patches) == 100


def test_without_matplotlib_the_figure_is_kept_as_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\ncow\n")
    given = ["reproduce", "--study", "prototypes", "--backbone", "tiny", "--lists", f"pets={names}"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    assert "pip install 'ood-iim[plot]'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out" / "prototypes").iterdir()] == ["prototypes.json"]


def test_the_halves_of_imagenet():
    easy, hard = imagenet_halves().values()
    assert len(easy) == len(hard) == 500
    assert (easy[0], hard[-1]) == ("tench", "toilet paper")


def test_table_2_stands_beside_the_study_of_the_losses():
    rows = _published("losses", "ImageNet-500-Hard", [4])
    names = [f"4 shots, {label}" for label in STUDIES["losses"]]
    figures = {"average": {"auroc": (0.9, 0.0), "fpr95": (0.3, 0.0)}, "accuracy": (0.7, 0.0)}
    found = _compared("losses", {name: {"s_mcm": figures} for name in names}, dict.fromkeys(names, "s_mcm"), rows)
    assert [one.row for one in found if one.measure == "auroc"] == names
    assert [one.published for one in found if one.measure == "auroc"][-1] == 93.55
    assert found[-1].difference == pytest.approx({"auroc": 90 - 93.55, "fpr95": 30 - 27.81}[found[-1].measure])
    assert len(rows) == len(STUDIES["losses"])
    assert rows[-1]["average"] == {"fpr95": 27.81, "auroc": 93.55}
    assert _published("losses", "ImageNet-1k", [4]) == _published("losses", "ImageNet-500-Hard", [16]) == []
    assert _published("k", "ImageNet-500-Hard", [4]) == []
