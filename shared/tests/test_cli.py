"""The command `ood` as a person or a script uses it: output, files, exit codes, one-sentence errors."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pandas as pd
import pytest
import torch
from ood_core import create_backbone, create_detector, extract
from ood_core.cli import common, main
from ood_core.data import scenes
from ood_core.detectors.base import Detector
from ood_core.fusion import Fusion
from ood_core.registry import DETECTORS
from PIL import Image

CLASSES = scenes.ID_CLASSES[:4]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """id (fit, val, test) and ood folders of generated images."""
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("fit", 0), ("val", 1), ("test", 2)):
        scenes.write_folder(scenes.render(CLASSES, 8, seed=seed), root / name)
    scenes.write_folder(scenes.textures(12), root / "textures")
    scenes.write_folder(scenes.noise(10), root / "noise")
    (root / "classes.txt").write_text("\n".join(sorted(CLASSES)))
    (root / "twice.txt").write_text("cat\ndog\ncat\n")
    (root / "one.txt").write_text("cat\n")
    (root / "latin.txt").write_bytes("café\ndog\n".encode("latin-1"))
    return root


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_score_table_equals_the_detector(data, tmp_path, capsys):
    out = tmp_path / "scores.parquet"
    code, printed, err = run(
        capsys, "score", data / "test", "--detector", "mcm", "gl_mcm", "--classes", data / "classes.txt", "--out", out
    )
    assert (code, printed) == (0, "")
    assert "32 images scored, 0 failed" in err
    frame = pd.read_parquet(out)
    assert list(frame.columns) == ["id", "source", "label", "status", "mcm", "gl_mcm"]
    backbone = create_backbone("tiny")
    for name in ("mcm", "gl_mcm"):
        scores = create_detector(name, backbone=backbone, class_names=sorted(CLASSES)).score(data / "test")
        np.testing.assert_allclose(frame[name], scores.numpy(), rtol=1e-6)
    assert frame["id"].is_monotonic_increasing
    assert set(frame["label"]) == set(CLASSES)


def test_json_is_one_value_and_nothing_else(data, capsys, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    code, out, _ = run(
        capsys, "score", data / "noise", "--detector", "mcm", "--classes", tmp_path / "classes.txt", "--json"
    )
    rows = json.loads(out)
    assert code == 0
    assert len(rows) == 10
    assert rows[0].keys() == {"id", "label", "status", "mcm"}
    assert 0.25 < rows[0]["mcm"] < 1
    code, out, _ = run(capsys, "list", "--json")
    assert {"mcm", "knn"} <= set(json.loads(out)["detectors"])
    code, out, _ = run(capsys, "doctor", "--json")
    assert json.loads(out)["installed"]["torch"]


def test_names_are_listed_without_loading_torch():
    script = "import sys; from ood_core.cli import main; main(['list']); sys.exit('torch' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "  mcm\n" in listed.stdout
    assert "  tiny\n" in listed.stdout


def test_list_check_says_what_detectors_need_and_which_are_broken(monkeypatch, capsys):
    entries = {name: EntryPoint(name, "ood_core.detectors.knn:KNN", "ood.detectors") for name in ("knn", "mine")}
    entries["mine"] = EntryPoint("mine", "no_such_package:Mine", "ood.detectors")
    monkeypatch.setitem(DETECTORS.__dict__, "entries", entries)
    code, out, _ = run(capsys, "list", "--json")
    assert (code, "broken" in json.loads(out)) == (0, False)
    code, out, _ = run(capsys, "list", "--check", "--json")
    assert json.loads(out)["needs"] == {"knn": ["image"]}
    assert "no_such_package" in json.loads(out)["broken"]["mine"]
    code, out, _ = run(capsys, "list", "--check")
    assert [line.split(":")[0].split() for line in out.splitlines()[1:3]] == [
        ["knn", "needs", "image"],
        ["mine", "broken"],
    ]


def test_doctor_of_a_backbone_says_what_was_decided(capsys):
    code, out, _ = run(capsys, "doctor", "tiny", "--dtype", "float32", "--json")
    found = json.loads(out)
    assert (code, found["backbone"]) == (0, "tiny")
    assert found["fingerprint"] == create_backbone("tiny", dtype="float32").fingerprint
    values = {row["what"]: row["value"] for row in found["decisions"]}
    assert (values["patch grid"], values["width"]) == ("8 x 8", "192")
    code, out, _ = run(capsys, "doctor", "tiny")
    assert "patch grid" in out
    assert run(capsys, "doctor", "tinny")[0] == 2


def test_plain_score_prints_a_row_per_image(data, capsys):
    code, out, _ = run(capsys, "score", data / "noise", "--detector", "knn", "--fit", data / "fit")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split("\t") == ["id", "label", "status", "knn"]
    assert len(lines) == 11


def test_evaluate_writes_figures_that_the_scores_give(data, tmp_path, capsys):
    argv = ["--id", data / "test", "--ood", f"a={data / 'textures'}", data / "noise", "--fit", data / "fit"]
    argv += ["--calibrate", data / "val", "--bootstrap", "50", "--out", tmp_path / "out"]
    code, printed, _ = run(capsys, "evaluate", "--detector", "mcm", "knn", *argv)
    assert code == 0
    assert "mcm" in printed
    assert "AUROC" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    frame = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert results["schema"] == 1
    assert list(frame["source"].unique()) == ["id", "a", "noise"]
    from sklearn.metrics import roc_auc_score

    for name in ("mcm", "knn"):
        figures = results["detectors"][name]
        for source in ("a", "noise"):
            part = frame[frame["source"].isin(["id", source])]
            expected = roc_auc_score(part["source"] == "id", part[name])
            assert figures["per_set"][source]["auroc"] == pytest.approx(expected, abs=1e-12)
            ids = np.sort(frame.loc[frame["source"] == "id", name])[::-1]
            threshold = ids[int(np.ceil(0.95 * len(ids))) - 1]
            accepted = (frame.loc[frame["source"] == source, name] >= threshold).mean()
            assert figures["per_set"][source]["fpr95"] == pytest.approx(accepted, abs=1e-12)
            assert figures["per_set"][source]["auroc_low"] <= figures["per_set"][source]["auroc"]
        mean = np.mean([figures["per_set"][s]["auroc"] for s in ("a", "noise")])
        assert figures["average"]["auroc"] == pytest.approx(mean, abs=1e-12)
    environment = results["environment"]
    assert environment["backbones"][0]["spec"] == "tiny"
    assert environment["versions"]["torch"]
    assert results["data"]["id"]["images"] == 32
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:200]
    page = tmp_path / "out" / "report.html"
    pictures = page.read_text().count("<img")
    page.unlink()
    assert run(capsys, "report", tmp_path / "out")[0] == 0
    assert pictures > page.read_text().count("<img") == 0
    sets = ["--id", data / "test", "--ood", f"a={data / 'textures'}", data / "noise"]
    assert run(capsys, "report", tmp_path / "out", *sets)[0] == 0
    assert page.read_text().count("<img") == pictures
    code, _, err = run(capsys, "report", tmp_path / "out", "--ood", f"b={data / 'noise'}")
    assert code == 2
    assert "holds no set 'b'; its sets are id, a, noise" in err


def test_rows_name_the_predicted_class_and_decide_by_it(data, tmp_path, capsys):
    saved, many = tmp_path / "probe", tmp_path / "many"
    scenes.write_folder(scenes.render(CLASSES, 24, seed=3), many)
    given = ["--detector", "linear_probe", "--fit", data / "fit", "--id", many, "--out", saved]
    assert run(capsys, "calibrate", *given)[0] == 0
    detector = Detector.from_pretrained(saved, backbone=create_backbone("tiny"))
    features = extract(detector.backbone, data / "noise", needs={"image"})
    for option in ([], ["--by-class"]):
        code, out, _ = run(capsys, "score", data / "noise", "--detector", saved, *option, "--json")
        rows = {row["id"]: row for row in json.loads(out)}
        assert code == 0
        names = [detector.class_names[number] for number in detector.predict(features)]
        assert [rows[name]["linear_probe.class"] for name in features.ids] == names
        wanted = dict(zip(features.ids, detector.p_value(features, by_class=bool(option)).tolist(), strict=True))
        assert {name: row["linear_probe.p_value"] for name, row in rows.items()} == pytest.approx(wanted, abs=1e-6)
        ood = detector.is_ood(features, by_class=bool(option)).tolist()
        assert [rows[name]["linear_probe.ood"] for name in features.ids] == ood


def test_decisions_by_class_need_a_calibrated_detector_that_classifies(data, tmp_path, capsys):
    code, _, err = run(capsys, "score", data / "noise", "--detector", "knn", "--fit", data / "fit", "--by-class")
    assert code == 4
    assert "--by-class needs calibrated detectors, and 'knn' is not" in err
    given = ["--detector", "knn", "--param", "k=3", "--fit", data / "fit", "--id", data / "val"]
    assert run(capsys, "calibrate", *given, "--out", tmp_path / "knn")[0] == 0
    code, _, err = run(capsys, "score", data / "noise", "--detector", tmp_path / "knn", "--by-class")
    assert code == 2
    assert "'knn' has no predicted class for these data" in err


def test_calibrating_on_the_images_that_were_fitted_is_refused(data, tmp_path, capsys):
    many = scenes.write_folder(scenes.render(CLASSES, 12, seed=3), tmp_path / "many")
    sources = ["--fit", many, "--id", many]
    fused = ["fuse", "--detector", "knn", "mahalanobis", *sources]
    evaluated = ["evaluate", "--detector", "knn", *sources, "--ood", f"a={data / 'noise'}", "--calibrate", many]
    for command in (["calibrate", "--detector", "knn", *sources], fused, evaluated):
        code, _, err = run(capsys, *command, "--out", tmp_path / "out")
        assert code == 3
        assert f"of the {12 * len(CLASSES)} calibration images are among those that 'knn' was fitted on" in err
        assert "--allow-overlap" in err
        assert not (tmp_path / "out").exists()
    for command in (["calibrate", "--detector", "knn", *sources], fused, evaluated):
        assert run(capsys, *command, "--allow-overlap", "--out", tmp_path / command[0])[0] == 0
    code, _, err = run(capsys, "calibrate", "--detector", tmp_path / "calibrate", "--id", many, "--out", tmp_path / "x")
    assert code == 3
    assert "was fitted on" in err


def test_saved_detectors_are_loaded_in_their_precision(data, tmp_path, capsys, monkeypatch):
    given = ["--detector", "knn", "--fit", data / "fit", "--id", data / "val", "--out", tmp_path / "knn"]
    assert run(capsys, "calibrate", *given, "--dtype", "bfloat16")[0] == 0
    loaded = []
    plain = common.load_backbone
    monkeypatch.setattr(common, "load_backbone", lambda *args: loaded.append(plain(*args)) or loaded[-1])
    for options, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        assert run(capsys, "score", data / "noise", "--detector", tmp_path / "knn", *options)[0] == 0
        assert loaded[-1].dtype == dtype


def test_calibrated_detector_is_saved_and_decides(data, tmp_path, capsys):
    code, _, err = run(
        capsys,
        "calibrate",
        "--detector",
        "knn",
        "--param",
        "k=3",
        "--fit",
        data / "fit",
        "--id",
        data / "val",
        "--out",
        tmp_path / "knn",
    )
    assert code == 0
    assert "are OOD" in err
    # 31 of 32: the quantiles of Beta(31, 2)
    assert "with 32 calibration images the true share lies between 83.8 and 99.2 % (95 % interval)" in err
    code, out, _ = run(capsys, "score", data / "noise", "--detector", tmp_path / "knn", "--json")
    rows = json.loads(out)
    assert code == 0
    assert all(row["knn.ood"] is True for row in rows)
    assert all(0 < row["knn.p_value"] <= 1 / 33 + 1e-6 for row in rows)
    code, out, err = run(capsys, "score", data / "noise", "--detector", tmp_path / "knn", "--fdr", "0.05", "--json")
    assert code == 0
    assert "knn: 10 of 10 images are OOD at a false discovery rate of 0.05" in err
    assert all(row["knn.ood"] is True for row in json.loads(out))
    code, out, err = run(capsys, "score", data / "test", "--detector", tmp_path / "knn", "--fdr", "0.05", "--json")
    assert "knn: 0 of 32 images" in err  # one of 32 is named only at 0.05 / 32, below 1 / 33
    code, _, err = run(capsys, "score", data / "noise", "--detector", tmp_path / "knn", "--fdr", "0.01")
    assert code == 3
    assert "calibrate with at least 99" in err


@pytest.fixture(scope="module")
def tables(data):
    """Score tables of two detectors on val (ID), and on test and textures."""
    for name in ("mcm", "max_logit"):
        for source in ("val", "test", "textures"):
            argv = ["score", data / source, "--detector", name, "--out", data / f"{name}-{source}.parquet"]
            assert main([str(arg) for arg in [*argv, "--classes", data / "classes.txt"]]) == 0
    return data


def test_fuse_score_tables(tables, tmp_path, capsys):
    files = [tables / f"{name}-textures.parquet" for name in ("mcm", "max_logit")]
    known = [tables / f"{name}-val.parquet" for name in ("mcm", "max_logit")]
    out = tmp_path / "fused.parquet"
    code, printed, err = run(capsys, "fuse", *files, "--calibration", *known, "--combine", "fisher", "--out", out)
    assert (code, printed) == (0, "")
    assert "12 images scored, 0 without a score" in err
    assert "fusion: set to accept 95 % of ID images; with 32 calibration images" in err
    columns = ["mcm", "max_logit"]
    val, test = (
        {name: pd.read_parquet(tables / f"{name}-{source}.parquet")[name].to_numpy() for name in columns}
        for source in ("val", "textures")
    )
    fusion = Fusion(columns, combine="fisher").calibrate(val)
    frame = pd.read_parquet(out)
    assert list(frame.columns) == ["id", "source", "label", "status", "mcm", "max_logit", "fusion"]
    np.testing.assert_array_equal(frame["fusion"], fusion.combine_scores(test).numpy())
    code, printed, err = run(
        capsys, "fuse", f"a={files[0]}", f"b={files[0]}", "--calibration", f"a={known[0]}", f"b={known[0]}",
        "--weight", "a=1", "b=3", "--name", "both", "--fdr", "0.3", "--json",
    )  # fmt: skip
    rows = json.loads(printed)
    assert code == 0
    assert rows[0].keys() == {"id", "source", "label", "status", "a", "b", "both", "both.ood", "both.p_value"}
    assert "images are OOD at a false discovery rate of 0.3" in err


def test_fuse_counts_images_that_a_table_lacks(tables, tmp_path, capsys):
    table = pd.read_parquet(tables / "max_logit-test.parquet")
    table.drop(index=[3, 4]).to_parquet(tmp_path / "part.parquet")
    known = [tables / f"{name}-val.parquet" for name in ("mcm", "max_logit")]
    out = tmp_path / "fused.parquet"
    code, _, err = run(
        capsys, "fuse", tables / "mcm-test.parquet", tmp_path / "part.parquet", "--calibration", *known, "--out", out
    )
    assert code == 0
    assert "2 images are not in all of" in err
    assert "30 images scored, 2 without a score" in err
    frame = pd.read_parquet(out)
    assert len(frame) == 32
    assert frame["fusion"].isna().sum() == 2
    assert set(frame["status"]) == {"ok", "no row with a score of max_logit"}


def test_fuse_detectors_saves_one(data, tmp_path, capsys):
    argv = ["--fit", data / "fit", "--id", data / "val", "--tpr", "0.9", "--out", tmp_path / "fused"]
    code, out, err = run(capsys, "fuse", "--detector", "mcm", "knn", "--param", "k=3", "--combine", "cauchy", *argv)
    assert (code, out) == (0, "")
    assert "fusion: set to accept 90 % of ID images" in err
    code, out, _ = run(capsys, "score", data / "noise", "--detector", tmp_path / "fused", "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows[0].keys() == {"id", "label", "status", "fusion", "fusion.ood", "fusion.p_value"}
    backbone = create_backbone("tiny")
    mcm = create_detector("mcm", backbone=backbone, class_names=sorted(CLASSES))
    fusion = Fusion([mcm, create_detector("knn", backbone=backbone, k=3)], combine="cauchy")
    fusion.fit(data / "fit").calibrate(data / "val", 0.9)
    np.testing.assert_allclose([row["fusion"] for row in rows], fusion.score(data / "noise").numpy(), rtol=1e-5)
    argv = ["--id", data / "test", "--ood", data / "noise", "--out", tmp_path / "out"]
    code, _, _ = run(capsys, "evaluate", "--detector", tmp_path / "fused", "mcm", *argv)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == 0
    assert results["detectors"]["fusion"]["calibration"]["n"] == 32
    assert results["detectors"]["fusion"]["params"]["members"] == ["mcm", "knn"]
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:200]


def test_stacking_says_what_it_learned_from(tables, tmp_path, capsys):
    scenes.write_folder(scenes.noise(25), tables / "many")
    argv = ["--fit", tables / "fit", "--id", tables / "fit", "--labelled-ood", tables / "many", "--out"]
    code, _, err = run(capsys, "fuse", "--detector", "mcm", "max_logit", "--combine", "stacking", *argv, tmp_path / "f")
    assert code == 3
    assert "16 calibration images are too few" in err
    scenes.write_folder(scenes.render(CLASSES, 12, seed=7), tables / "more")
    argv[3] = tables / "more"
    code, _, err = run(capsys, "fuse", "--detector", "mcm", "max_logit", "--combine", "stacking", *argv, tmp_path / "f")
    assert code == 0
    assert "25 labelled OOD images and every second ID image" in err
    saved = json.loads((tmp_path / "f" / "config.json").read_text())
    assert saved["labelled_ood"]["images"] == 25
    assert saved["calibration"]["n"] == 24
    files = {
        name: [tables / f"{detector}-{name}.parquet" for detector in ("mcm", "max_logit")]
        for name in ("test", "val", "textures")
    }
    code, _, err = run(
        capsys, "fuse", *files["test"], "--calibration", *files["val"], "--combine", "stacking",
        "--labelled-ood", *files["textures"],
    )  # fmt: skip
    assert code == 3
    assert "16 calibration images are too few" in err  # half of 32


def test_extract_fills_a_cache_that_score_uses(data, tmp_path, capsys):
    code, _, err = run(capsys, "extract", data / "test", "--needs", "image", "--cache", tmp_path)
    assert code == 0
    assert "32 images" in err
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 1
    known = ["--classes", data / "classes.txt"]
    code, _, _ = run(capsys, "score", data / "test", "--detector", "mcm", *known, "--cache", tmp_path)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_recorded_failures_are_counted_everywhere(data, tmp_path, capsys):
    folder = scenes.write_folder(scenes.render(CLASSES, 6, seed=5), tmp_path / "images")
    (folder / CLASSES[0] / "zz.jpg").write_text("<html>404</html>")
    out = tmp_path / "scores.parquet"
    scoring = ["score", folder, "--detector", "mcm", "--classes", data / "classes.txt"]
    code, _, err = run(capsys, *scoring, "--out", out)
    assert code == 3
    assert "zz.jpg" in err
    assert not out.exists()
    code, _, err = run(capsys, *scoring, "--on-error", "record", "--out", out)
    assert code == 0
    assert "24 images scored, 1 failed" in err
    frame = pd.read_parquet(out)
    assert len(frame) == 25
    bad = frame[frame["status"] != "ok"]
    assert bad["id"].tolist() == [f"{CLASSES[0]}/zz.jpg"]
    assert bad["mcm"].isna().all()
    code, _, err = run(
        capsys, "evaluate", "--detector", "mcm", "--id", folder, "--ood", data / "noise",
        "--on-error", "record", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert "Images without a score: id 1" in err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"]["id"]["failures"] == 1


MISTAKES = [
    (["score", "{data}/test", "--detector", "mmc"], 2, "Unknown detector 'mmc'. Did you mean 'mcm'"),
    (["score", "{data}/test", "--detector", "mcm", "--backbone", "tinny"], 2, "Did you mean 'tiny'"),
    (["score", "{data}/nowhere", "--detector", "mcm"], 3, "nowhere"),
    (["score", "{data}", "--detector", "mcm", "--classes", "{data}/none.txt"], 3, "none.txt"),
    (["score", "{data}/noise", "--detector", "mcm"], 2, "--classes FILE"),
    (["score", "{data}/test", "--detector", "knn"], 4, "must be fitted"),
    (["score", "{data}/test", "--detector", "mcm", "--param", "k=3"], 2, "None of the detectors has an option 'k'"),
    (["score", "{data}/test", "--detector", "mcm", "--param", "temperature"], 2, "KEY=VALUE"),
    (["score", "{data}/test", "--detector", "mcm", "--fit", "{data}/fit", "--template", "no braces"], 2, "no braces"),
    (["score", "{data}/test", "--detector", "mcm", "--out", "scores.csv"], 2, "must end in .parquet"),
    (["score", "{data}/test", "--detector", "knn", "knn"], 2, "given twice"),
    (
        ["evaluate", "--detector", "mcm", "--id", "{data}/test", "--ood", "id={data}/noise", "--out", "{data}/o"],
        2,
        "'id'",
    ),
    (
        ["calibrate", "--detector", "mcm", "--id", "{data}/noise", "--classes", "imagenet", "--out", "{data}/o"],
        3,
        "too few",
    ),
    (["score", "{data}/test", "--detector", "mcm", "--fdr", "1.5"], 2, "--fdr 1.5 must lie between 0 and 1"),
    (
        ["score", "{data}/test", "--detector", "mcm", "--fit", "{data}/fit", "--fdr", "0.1"],
        4,
        "'mcm' is not: see `ood calibrate`",
    ),
    (["fuse"], 2, "either score tables"),
    (["score", "{data}/test", "--detector", "mcm"], 2, "--classes FILE, or --fit SOURCE"),
    (["score", "{data}/test", "--detector", "mcm", "--fit", "{data}/noise"], 2, "--classes FILE, or --fit SOURCE"),
    (["score", "{data}/test", "--detector", "vim", "--fit", "{data}/noise"], 3, "needs at least two classes"),
    (["calibrate", "--detector", "mcm", "--id", "{data}/val", "--out", "{data}/o"], 2, "--classes FILE"),
    (["fuse", "--detector", "mcm", "max_logit", "--id", "{data}/val", "--out", "{data}/o"], 2, "--classes FILE"),
    (["score", "{data}/test", "--detector", "mcm", "--classes", "{data}/twice.txt"], 2, "'cat' is given twice"),
    (["score", "{data}/test", "--detector", "gen", "--classes", "{data}/one.txt"], 2, "needs at least two classes"),
    (["score", "{data}/test", "--detector", "mcm", "--classes", "{data}/latin.txt"], 3, "--encoding latin-1"),
    (["extract", "{data}/test", "--cache", "{data}/one.txt"], 3, "is a file; name a folder"),
    (["extract", "{data}/test", "--cache", "{data}/one.txt/below"], 3, "is a file; name a folder"),
    (["calibrate", "--detector", "knn", "--id", "{data}/nowhere", "--out", "{data}/one.txt"], 3, "one.txt' is a file"),
    (
        ["evaluate", "--detector", "knn", "--id", "{data}/nowhere", "--ood", "mean={data}/noise", "--out", "{data}/o"],
        2,
        "cannot be named 'mean'",
    ),
    (
        ["evaluate", "--detector", "knn", "--id", "x", "--ood", "a={data}", "--out", "{data}/one.txt"],
        3,
        "one.txt' is a file",
    ),
    (["evaluate", "--protocol", "imagenet-1k", "--root", "{data}", "--set", "train", "--dry-run"], 2, "NAME=PLACE"),
    (["evaluate", "--detector", "knn", "--id", "x", "--ood", "=x", "--out", "{data}/o"], 2, "NAME=SOURCE"),
    (["fuse", "a.parquet", "--detector", "mcm"], 2, "either score tables"),
    (["fuse", "{data}/none.parquet", "--calibration", "{data}/none.parquet"], 3, "No score table"),
    (["fuse", "{data}/none.parquet"], 2, "--calibration"),
    (["fuse", "a.parquet", "--calibration", "b.parquet", "--out", "c.csv"], 2, "must end in .parquet"),
    (["fuse", "a.parquet", "--calibration", "b.parquet", "--combine", "stacking"], 2, "--labelled-ood"),
    (["fuse", "a.parquet", "--calibration", "b.parquet", "--labelled-ood", "c.parquet"], 2, "nothing else may see it"),
    (["fuse", "--detector", "mcm", "knn", "--out", "{data}/o"], 2, "--id SOURCE and --out DIR"),
    (["extract", "{data}/test"], 2, "--cache"),
    (["extract", "{data}/test", "--needs", "image,texture", "--cache", "{data}/c"], 2, "'texture'"),
    (["report", "{data}"], 3, "results.json"),
]


@pytest.mark.parametrize(("argv", "code", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_and_an_exit_code(argv, code, sentence, data, capsys):
    got, out, err = run(capsys, *(arg.format(data=data) for arg in argv))
    assert got == code
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""
    assert len(err.strip().splitlines()) == 1


def test_usage_errors_of_the_parser(capsys):
    for argv in (["score"], ["dance"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def test_debug_shows_the_traceback(data):
    with pytest.raises(ValueError, match="mmc"):
        main(["score", str(data / "test"), "--detector", "mmc", "--debug"])


def test_the_installed_command_and_a_closed_pipe(data):
    command = f"{sys.executable} -c 'import sys; from ood_core.cli import main; sys.exit(main())'"
    shown = subprocess.run([*_shell(command + " --help")], capture_output=True, text=True, check=True)
    assert "evaluate" in shown.stdout
    piped = subprocess.run(_shell(command + " list | head -1"), capture_output=True, text=True, check=True)
    assert piped.stdout == "Detectors:\n"
    assert "Traceback" not in piped.stderr


def _shell(command):
    return ["bash", "-c", command]


def test_import_is_light_and_quick():
    script = """
import sys, time
start = time.perf_counter()
import ood_core
elapsed = time.perf_counter() - start
heavy = {"torch", "triton", "transformers", "matplotlib", "sklearn", "pandas", "timm", "open_clip"} & set(sys.modules)
assert not heavy, heavy
ood_core.create_detector, ood_core.metrics
heavy = {"triton", "transformers", "matplotlib", "sklearn"} & set(sys.modules)
assert elapsed < 1.5, elapsed
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    script = "import sys, ood_core.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    everything = """
import sys, ood_core
for name in ood_core.__all__:
    getattr(ood_core, name)
heavy = {"transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", everything], check=True)


def test_evaluate_says_where_its_classes_come_from(data, tmp_path, capsys):
    argv = ["evaluate", "--detector", "mcm", "--id", data / "test", "--ood", data / "noise", "--out", tmp_path / "out"]
    code, _, err = run(capsys, *argv)
    assert code == 0
    assert "The known classes are the 4 labels of --id" in err
    code, _, err = run(capsys, *argv, "--classes", data / "classes.txt")
    assert code == 0
    assert "labels of --id" not in err


def test_control_characters_in_names_do_not_break_rows(data, tmp_path, capsys):
    folder = scenes.write_folder(scenes.noise(2), tmp_path / "odd")
    first = min(folder.rglob("*.png"))
    first.rename(first.with_name("new\nline\t\x1b[31m.png"))
    code, out, _ = run(capsys, "score", folder, "--detector", "knn", "--fit", data / "fit")
    assert code == 0
    assert len(out.splitlines()) == 3
    assert all(line.count("\t") == 3 for line in out.splitlines())
    assert r"new\nline\t\x1b[31m.png" in out
    code, out, _ = run(capsys, "score", folder, "--detector", "knn", "--fit", data / "fit", "--json")
    assert any("new\nline\t\x1b[31m.png" in row["id"] for row in json.loads(out))


def test_columns_that_are_no_scores_are_kept_and_not_fused(tables, tmp_path, capsys):
    files = []
    for name in ("mcm", "max_logit"):
        table = pd.read_parquet(tables / f"{name}-test.parquet")
        table.assign(note="seen", age=range(len(table)), blurred=False).to_parquet(tmp_path / f"{name}.parquet")
        files.append(tmp_path / f"{name}.parquet")
    known = [tables / f"{name}-val.parquet" for name in ("mcm", "max_logit")]
    code, _, err = run(capsys, "fuse", *files, "--calibration", *known, "--out", tmp_path / "fused.parquet")
    assert code == 0
    assert "'note', 'age', 'blurred'" in err
    frame = pd.read_parquet(tmp_path / "fused.parquet")
    own = ["id", "source", "label", "status", "note", "age", "blurred", "mcm", "max_logit", "fusion"]
    assert list(frame.columns) == own
    assert frame["age"].tolist() == list(range(32))
    code, _, _ = run(
        capsys, "fuse", *[tables / f"{name}-test.parquet" for name in ("mcm", "max_logit")], "--calibration", *known,
        "--out", tmp_path / "plain.parquet",
    )  # fmt: skip
    np.testing.assert_array_equal(frame["fusion"], pd.read_parquet(tmp_path / "plain.parquet")["fusion"])


def test_tables_are_read_as_the_options_say(data, tmp_path, capsys):
    files = sorted(path.relative_to(data) for path in (data / "fit").rglob("*.png"))
    text = "".join(f"{file};{file.parts[1]}\n" for file in files)
    (data / "fit.csv").write_bytes(f"file;größe\n{text}".encode("latin-1"))
    given = ["--path-column", "file", "--label-column", "größe", "--encoding", "latin-1"]
    code, out, _ = run(
        capsys, "score", data / "fit.csv", "--detector", "mcm", "--fit", data / "fit.csv", *given, "--json"
    )
    assert code == 0
    expected = create_detector("mcm", backbone="tiny", class_names=sorted(CLASSES)).score(data / "fit")
    np.testing.assert_allclose([row["mcm"] for row in json.loads(out)], expected.numpy(), rtol=1e-6)


@pytest.fixture
def scans(tmp_path):
    """A folder of 16-bit TIFFs that hold 12-bit values, and class names beside it."""
    rng = np.random.default_rng(0)
    root = tmp_path / "scans"
    root.mkdir()
    for name in "ab":
        Image.fromarray(rng.integers(0, 4096, (64, 64)).astype(np.uint16)).save(root / f"{name}.tif")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return root


def test_value_range_and_max_pixels_reach_the_images(scans, tmp_path, capsys, caplog):
    command = ["score", scans, "--detector", "mcm", "--classes", tmp_path / "classes.txt", "--json"]
    code, plain, _ = run(capsys, *command)
    assert (code, caplog.text.count("--value-range 0,4095")) == (0, 1)
    caplog.clear()
    code, ranged, _ = run(capsys, *command, "--value-range", "0,4095")
    assert (code, caplog.text) == (0, "")
    assert json.loads(plain) != json.loads(ranged)
    code, signed, _ = run(capsys, *command, "--value-range", "-4095,4095")
    assert code == 0
    assert json.loads(signed) != json.loads(ranged)
    code, _, err = run(capsys, *command, "--max-pixels", "4000")
    assert (code, "64 x 64 pixels and max_pixels is 4000" in err) == (3, True)
    code, _, err = run(capsys, *command, "--value-range", "9,1")
    assert (code, "black before white" in err) == (2, True)
    with pytest.raises(SystemExit, match="2"):
        run(capsys, *command, "--value-range", "low,high")


def test_one_image_is_a_source(scans, tmp_path, capsys):
    command = ["score", scans / "a.tif", "--detector", "mcm", "--classes", tmp_path / "classes.txt", "--json"]
    code, out, _ = run(capsys, *command)
    assert (code, [row["id"] for row in json.loads(out)]) == (0, ["a.tif"])


def test_results_count_odd_images_and_skipped_files(data, scans, tmp_path, capsys):
    (scans / "c.heic").write_bytes(b"")
    command = ["evaluate", "--detector", "mcm", "--id", data / "test", "--ood", f"scans={scans}"]
    code, out, _ = run(capsys, *command, "--out", tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(out)["data"]
    assert (found["ood"]["scans"]["notes"], found["ood"]["scans"]["skipped"]) == ({"narrow": 2}, ["c.heic"])
    assert (found["id"]["notes"], found["id"]["skipped"]) == ({}, [])
    code, out, _ = run(capsys, *command, "--out", tmp_path / "out", "--json", "--value-range", "0,4095")
    ranged = json.loads(out)["data"]["ood"]["scans"]
    assert ranged["notes"] == {}
    assert ranged["fingerprint"] != found["ood"]["scans"]["fingerprint"]
