"""The command `ood` as a person or a script uses it: output, files, exit codes, one-sentence errors."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from ood_core import create_backbone, create_detector, extract
from ood_core.cli import main
from ood_core.data import scenes
from ood_core.detectors.base import Detector
from ood_core.fusion import Fusion
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
    return root


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_score_table_equals_the_detector(data, tmp_path, capsys):
    out = tmp_path / "scores.parquet"
    code, printed, err = run(capsys, "score", data / "test", "--detector", "mcm", "gl_mcm", "--out", out)
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
            assert main([str(arg) for arg in [*argv, "--classes", _classes(data)]]) == 0
    return data


def _classes(data):
    (data / "classes.txt").write_text("\n".join(sorted(CLASSES)))
    return data / "classes.txt"


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
    code, _, _ = run(capsys, "score", data / "test", "--detector", "mcm", "--cache", tmp_path)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_recorded_failures_are_counted_everywhere(data, tmp_path, capsys):
    folder = scenes.write_folder(scenes.render(CLASSES, 6, seed=5), tmp_path / "images")
    (folder / CLASSES[0] / "zz.jpg").write_text("<html>404</html>")
    out = tmp_path / "scores.parquet"
    code, _, err = run(capsys, "score", folder, "--detector", "mcm", "--out", out)
    assert code == 3
    assert "zz.jpg" in err
    assert not out.exists()
    code, _, err = run(capsys, "score", folder, "--detector", "mcm", "--on-error", "record", "--out", out)
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
    (["score", "{data}/test", "--detector", "mcm", "--template", "no braces"], 2, "no braces"),
    (["score", "{data}/test", "--detector", "mcm", "--out", "scores.csv"], 2, "must end in .parquet"),
    (["score", "{data}/test", "--detector", "mcm", "mcm"], 2, "given twice"),
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
    (["score", "{data}/test", "--detector", "mcm", "--fdr", "0.1"], 4, "'mcm' is not: see `ood calibrate`"),
    (["fuse"], 2, "either score tables"),
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
