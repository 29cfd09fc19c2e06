"""The runner and the commands from fit to reproduce, on miniature data, in one process."""

import json
import statistics

import numpy as np
import pytest
import torch
from ood_core import create_detector
from ood_core.data import ImageFolder, scenes
from ood_core.detectors.base import right_predictions
from ood_core.errors import UsageError
from ood_core.metrics import auroc
from ood_core.reproduction.studies import spread
from ood_hvl import reproduce as module
from ood_hvl.cli import main
from ood_hvl.detectors import HVL
from ood_hvl.layouts import leave_classes_out
from ood_hvl.reproduce import BASELINES, PARTS, published_table, pyramid_features, run_layout, summarise
from PIL import Image

TISSUES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
QUICK = ["--backbone", "tiny", "--dtype", "float32", "--param", "epochs=2"]


def fill(folder, count, seed, suffix="png", hue=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.clip(rng.normal(hue, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.{suffix}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("NCT-CRC-HE-100K", 4), ("CRC-VAL-HE-7K", 3)):
        for number, tissue in enumerate(TISSUES):
            fill(root / split / tissue, count, number + 10 * count, "tif", 25 * number)
    for name, seed in (("train", 1), ("test", 2)):
        scenes.write_folder(scenes.render(scenes.ID_CLASSES[:3], 8, seed=seed), root / name)
    scenes.write_folder(scenes.textures(12), root / "ood")
    return root


@pytest.fixture(scope="module")
def layout(image_folder):
    return leave_classes_out(str(image_folder), [scenes.ID_CLASSES[0]], fold_count=3)


@pytest.fixture(scope="module")
def features(layout, small_backbone):
    return pyramid_features(layout, small_backbone, {})


OPTIONS = {"epochs": 2}


def test_runs_are_those_of_the_detectors(layout, features, small_backbone):
    runs = run_layout(layout, small_backbone, features, options=OPTIONS, seeds=[0, 3], baselines=BASELINES)
    assert len(runs) == 3 * (2 * 2 + len(BASELINES))
    task = layout.tasks[1]
    parts = task.features(features)
    hvl = HVL(class_names=task.class_names, seed=3, **OPTIONS)
    hvl.attach(small_backbone)
    hvl.fit(parts["train"])
    (out,) = (part for name, part in parts.items() if name not in ("train", "test"))
    mine = {run["detector"]: run for run in runs if run["task"] == task.name and run["seed"] == 3}
    for name, detector in hvl.variants().items():
        expected = auroc(detector.score_features(parts["test"]), detector.score_features(out))
        assert mine[name]["auroc"] == pytest.approx(expected)
    assert mine["hvl"]["accuracy"] == pytest.approx(right_predictions(hvl, parts["test"]).float().mean().item())
    knn = create_detector("knn").fit(parts["train"])
    expected = auroc(knn.score_features(parts["test"]), knn.score_features(out))
    (alone,) = (run for run in runs if run["task"] == task.name and run["detector"] == "knn")
    assert alone["auroc"] == pytest.approx(expected)
    assert (alone["seed"], alone["accuracy"]) == (None, None)


def test_features_of_the_whole_image_are_those_of_the_backbone(layout, features, small_backbone):
    pixels = torch.stack([small_backbone.transform(layout.source.open(i)) for i in range(4)])
    torch.testing.assert_close(features.image[:4], small_backbone.encode_image(pixels), rtol=1e-3, atol=1e-3)


def test_finished_runs_are_read_back(layout, features, small_backbone, tmp_path, monkeypatch):
    arguments = {"options": OPTIONS, "seeds": [0], "baselines": {"knn": ("knn", {})}, "folder": tmp_path}
    first = run_layout(layout, small_backbone, features, **arguments)
    judged = module._judge
    monkeypatch.setattr(module, "_judge", lambda *_: pytest.fail("it was computed again"))
    assert run_layout(layout, small_backbone, features, **arguments) == first
    with pytest.raises(UsageError, match=r"options\.epochs"):
        run_layout(layout, small_backbone, features, **(arguments | {"options": {"epochs": 3}}))
    with pytest.raises(UsageError, match="convention"):
        run_layout(layout, small_backbone, features, **(arguments | {"convention": "openood"}))
    monkeypatch.setattr(module, "_judge", judged)
    (tmp_path / layout.tasks[0].name / "seed-0.json").write_text("{")
    assert run_layout(layout, small_backbone, features, **arguments) == first


def test_summary_over_folds_and_over_tasks(layout):
    runs = [
        {"task": task, "seed": seed, "detector": "hvl", "accuracy": None if seed else 0.5, "auroc": a, "fpr95": 0.5}
        for task, seed, a in [("x", 0, 0.6), ("x", 1, 0.7), ("y", 0, 0.8), ("y", 1, 0.95)]
    ]
    folds = summarise(runs, layout)["hvl"]  # folds of one task: the seeds of a fold are averaged first
    assert folds["auroc"]["runs"] == 2
    assert folds["auroc"]["mean"] == pytest.approx((0.65 + 0.875) / 2)
    assert folds["auroc"]["std"] == pytest.approx(statistics.stdev([0.65, 0.875]))
    assert folds["accuracy"] is None
    other = type("L", (), {"tasks": [type("T", (), {"class_names": names})() for names in (["a"], ["b"])]})()
    tasks = summarise(runs, other)["hvl"]["auroc"]  # tasks are averaged per seed first
    assert tasks["runs"] == 2
    assert tasks["mean"] == pytest.approx((0.7 + 0.825) / 2)
    assert tasks["std"] == pytest.approx(statistics.stdev([0.7, 0.825]))
    assert tasks["high"] - tasks["mean"] == pytest.approx(12.7062 * tasks["std"] / 2**0.5, rel=1e-4)
    (alone,) = summarise(runs[:1], layout).values()
    assert (alone["auroc"]["mean"], alone["auroc"]["std"], alone["auroc"]["low"]) == (0.6, None, None)


# ---- commands


@pytest.fixture(scope="module")
def detector(data):
    out = data / "detector"
    assert main(["fit", f"{data}/train", "--out", str(out), "--calibrate", f"{data}/test", *QUICK]) == 0
    return out


def test_fit_saves_a_calibrated_detector_and_no_checkpoint(detector):
    assert {path.name for path in detector.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    config = json.loads((detector / "config.json").read_text())
    assert config["threshold"] is not None
    assert config["backbone"]["spec"] == "tiny"
    assert len(json.loads((detector / "training.json").read_text())) == 2


def test_score_evaluate_and_explain(detector, data, tmp_path, capsys):
    assert main(["score", f"{data}/ood", "--detector", str(detector), "--dtype", "float32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 12
    assert {"id", "hvl", "hvl.ood", "hvl.p_value"} <= set(rows[0])
    saved = ["--detector", str(detector), "--dtype", "float32", "--json"]
    sets = ["--id", f"{data}/test", "--ood", f"textures={data}/ood"]
    assert main(["evaluate", *saved, *sets, "--out", str(tmp_path)]) == 0
    assert list(json.loads(capsys.readouterr().out)["detectors"]) == ["hvl", "hvl_kept"]
    assert (tmp_path / "report.html").is_file()
    image = next((data / "test").rglob("*.png"))
    assert main(["explain", str(image), *saved, "--out", str(tmp_path / "why.png")]) == 0
    assert json.loads(capsys.readouterr().out)["predicted"] in scenes.ID_CLASSES
    assert (tmp_path / "why.png").is_file()


def reproduce(data, tmp_path, *arguments):
    return main(["reproduce", "--root", str(data), "--protocol", "nct-crc", "--out", str(tmp_path), *QUICK, *arguments])


def test_reproduce_prints_ours_beside_the_paper(data, tmp_path, capsys):
    assert reproduce(data, tmp_path, "--seeds", "0", "1", "--cache", str(tmp_path / "cache")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["percent,", "FPR95", "standard", "accuracy", "FPR95", "AUROC"]
    ours = [line.split("  ")[0] for line in lines[1:]]
    assert ours[:2] == ["HVL", "HVL, patch_mean=kept"]
    assert "gen of a linear probe" in ours
    (at,) = (index for index, line in enumerate(lines) if line.startswith("published: HVL"))
    assert lines[at].split()[-3:] == ["98.30", "37.59±0.82", "90.95±0.65"]
    assert "±" in lines[1]
    (header,) = (row for row, line in enumerate(lines) if line.startswith("ours - published, points"))
    assert lines[header].split("  ")[-1].split() == ["auroc"]
    compared = header + 1
    mine, theirs, difference = (
        [float(cell.split("±")[0].rstrip("!")) for cell in lines[row].split()[-3:]] for row in (1, at, compared)
    )
    assert lines[compared].startswith("HVL ")
    assert difference == pytest.approx(np.subtract(mine, theirs), abs=0.011)
    flags = [cell.endswith("!") for cell in lines[compared].split()[-3:]]
    assert flags == [abs(value) > 1.5 for value in difference]


def test_seeds_do_not_pass_for_folds(layout):
    """Runs of a fold are alike: counted as independent, they would make the interval too narrow."""
    rng = np.random.default_rng(0)
    hits = {"folds": 0, "runs": 0}
    for _ in range(300):
        values = rng.normal(0.8, 0.02, 5)[:, None] + rng.normal(0, 0.002, (5, 3))
        runs = [
            {"task": f"fold-{fold}", "seed": seed, "detector": "hvl", "accuracy": None, "auroc": value, "fpr95": 0.5}
            for (fold, seed), value in np.ndenumerate(values)
        ]
        found = summarise(runs, layout)["hvl"]["auroc"]
        naive = spread(list(values.flatten()))
        for name, interval in (("folds", found), ("runs", naive)):
            hits[name] += interval["low"] <= 0.8 <= interval["high"]
    assert 0.91 < hits["folds"] / 300 < 0.99
    assert hits["runs"] / 300 < 0.8


def test_reproduce_the_parts_of_table_2(data, tmp_path, capsys, monkeypatch):
    judged, evaluate = set(), module.evaluate

    def watch(made, **given):
        judged.update((found.selection, found.csf) for found in made.values() if isinstance(found, HVL))
        return evaluate(made, **given)

    monkeypatch.setattr(module, "evaluate", watch)
    triple = ["--ood-triples", "ADI,BACK,DEB"]
    assert reproduce(data, tmp_path, "--study", "parts", "--seeds", "0", *triple, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["published"]] == list(PARTS)
    assert {name for name in found["results"] if "patch_mean" not in name} == {*PARTS, "no lower scales"}
    for options, row in zip(PARTS.values(), published_table(2)["rows"], strict=True):
        selection = options.get("selection", "gain")
        assert (selection != "none", selection == "gain") == (row["ood_loss"], row["entropy_gain"])
        assert options.get("csf", True) == row["csf"]
    assert found["published"][-1]["auroc"] == 90.95
    # Of so few images, figures may agree by chance: what was judged may not.
    assert judged >= {(options.get("selection", "gain"), options.get("csf", True)) for options in PARTS.values()}


def test_a_dry_run_says_what_is_there(data, tmp_path, capsys):
    assert reproduce(data, tmp_path, "--dry-run") == 0
    assert "36 of 100,000" in capsys.readouterr().out
    assert reproduce(tmp_path, tmp_path, "--dry-run", "--json") == 0
    assert all(row["error"] for row in json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fit", "{data}/nothing", "--out", "{tmp}/x"], 3, "There is no"),
        (["fit", "{data}/train", "--out", "{tmp}/x", "--param", "k=17"], 2, "k=17"),
        (["fit", "{data}/train", "--out", "{tmp}/x", "--backbone", "timm:vit_tiny_patch16_224"], 2, "has no 'text'"),
        (["explain", "{data}/none.png", "--detector", "{data}/detector"], 3, "There is no image"),
        (["reproduce", "--root", "{data}", "--protocol", "isic"], 2, "Did you mean 'isic-4'"),
        (["reproduce", "--root", "{data}", "--protocol", "nct-crc", "--study", "q"], 2, "study 'q'"),
        (["reproduce", "--root", "{data}", "--protocol", "nct-crc", *QUICK, "--study", "epochs"], 2, "epochs=2 would"),
        (["reproduce", "--root", "{data}", "--protocol", "isic-4", "--backbone", "tiny"], 3, "ISIC_2019"),
    ],
)
def test_mistakes_are_one_sentence(arguments, code, words, data, detector, tmp_path, capsys):
    assert main([argument.format(data=data, tmp=tmp_path) for argument in arguments]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ood-hvl: ")
    assert words in error


def test_detectors_of_a_folder_are_found_by_the_core_command(detector, data, capsys):
    from ood_core.cli import main as ood

    assert ood(["score", f"{data}/ood", "--detector", str(detector), "--dtype", "float32", "--json"]) == 0
    assert ImageFolder(data / "ood").ids == [row["id"] for row in json.loads(capsys.readouterr().out)]
