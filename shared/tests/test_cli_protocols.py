"""`ood list protocols` and `ood evaluate --protocol`: what is found, what is run, what is refused."""

import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ood_core.cli import main
from ood_core.protocols import list_protocols
from PIL import Image

SKIN = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
TISSUE = ["AC", "H", "S", "T", "V"]


def encoded(colour, rng):
    """A noisy image of one colour."""
    buffer = io.BytesIO()
    pixels = np.clip(np.array(colour) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_pack(root, name, counts):
    """So many images of each (split, label), a colour per label."""
    rng = np.random.default_rng(len(name))
    colours = {label: rng.integers(0, 256, 3) for label in sorted({label for _, label in counts})}
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    columns = {
        "image": [encoded(colours[label], rng) for _, label in pairs],
        "label": [label for _, label in pairs],
        "split": [split for split, _ in pairs],
        "source": [f"{name}/{split}/{label}/{i}.png" for i, (split, label) in enumerate(pairs)],
    }
    pq.write_table(pa.table(columns), root / f"{name}.parquet")


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    root = tmp_path_factory.mktemp("packs")
    write_pack(root, "dermatology-ham10000", {(s, c): 5 for s in ("train", "val", "test") for c in SKIN})
    write_pack(root, "histology-colorectal", {(split, code): 3 for split in ("train", "test") for code in TISSUE})
    write_pack(root, "textures-dtd", {("test", "banded"): 4})
    return root


def run(capsys, *argv):
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def evaluate(capsys, *argv):
    return run(capsys, "evaluate", "--detector", "knn", "--param", "k=2", *argv)


# ---- list


def test_list_shows_every_protocol_with_its_sets(capsys):
    code, out, _ = run(capsys, "list", "protocols")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, list(lines)) == (0, list_protocols())
    assert lines["imagenet-1k"] == "ImageNet-1k; OOD: iNaturalist, SUN, Places, Texture"
    assert lines["openood-imagenet"].endswith("near: SSB-hard, NINCO; far: iNaturalist, Textures, OpenImage-O")
    assert lines["histology-5"] == "Histology-5; near: left out; far: dermoscopy (10 tasks)"


def test_list_as_json(capsys):
    code, out, _ = run(capsys, "list", "protocols", "--json")
    found = {about["name"]: about for about in json.loads(out)}
    assert (code, list(found)) == (0, list_protocols())
    assert found["openood-imagenet"]["convention"] == "openood"
    assert found["imagenet-x"]["sets"] == {"ImageNet-X others": "near"}
    code, out, _ = run(capsys, "list", "--json")
    assert {"detectors", "backbones"} <= set(json.loads(out))
    assert run(capsys, "list", "protocol")[0] == 2


# ---- dry run


def test_a_dry_run_says_what_is_there_and_needs_no_detector(packs, capsys):
    code, out, err = run(capsys, "evaluate", "--protocol", "ham-4", "--root", packs, "--dry-run")
    assert code == 0
    place = packs / "dermatology-ham10000.parquet"
    assert out.splitlines()[1] == f"calibration             20 of 249  {place}:val  (the count differs)"
    assert "ham-4: 4 classes, FPR95 standard" in err
    assert "Note: test: 20 images, not 489." in err
    code, out, _ = run(capsys, "evaluate", "--protocol", "histology-5", "--root", packs, "--dry-run", "--json")
    found = json.loads(out)
    assert (code, len(found["tasks"])) == (0, 10)
    assert found["sets"][1] == {
        "set": "test", "path": f"{packs / 'histology-colorectal.parquet'}:test", "images": 15, "expected": 150,
        "error": None,
    }  # fmt: skip


def test_a_dry_run_of_an_incomplete_protocol_names_what_is_missing(packs, capsys, tmp_path):
    places = ["--set", f"histology={tmp_path / 'nowhere'}"]
    argv = ["evaluate", "--protocol", "ham-4", "--root", packs, "--dry-run"]
    code, out, err = run(capsys, *argv, *places)
    assert code == 3
    assert "nowhere" in out.splitlines()[6]
    assert err == "ood: ham-4: 1 of 8 sets cannot be used (histology).\n"
    code, out, err = run(capsys, *argv, *places, "--json")
    found = json.loads(out)
    assert (code, found["tasks"], [row["set"] for row in found["sets"] if row["error"]]) == (3, [], ["histology"])
    code, out, err = run(capsys, "evaluate", "--protocol", "imagenet-1k", "--root", packs, "--dry-run")
    assert (code, "train" in out, "5 of 6 sets cannot be used (test, iNaturalist," in err) == (3, True, True)
    code, out, err = run(capsys, "evaluate", "--protocol", "ham-4", "--root", tmp_path / "no", "--dry-run")
    assert (code, out, "There is no folder" in err) == (3, "", True)


# ---- evaluation


def test_a_protocol_gives_all_sets_names_and_the_convention(packs, capsys, tmp_path):
    code, out, err = evaluate(capsys, "mcm", "--protocol", "ham-4", "--root", packs, "--out", tmp_path / "out")
    assert code == 2  # a stray word is no detector
    argv = ["evaluate", "--detector", "knn", "mcm", "--param", "k=2", "--protocol", "ham-4", "--root", packs]
    code, out, err = run(capsys, *argv, "--out", tmp_path / "out", "--json")
    assert code == 0
    results = json.loads(out)
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    data, protocol = results["data"], results["protocol"]
    names = ["actinic keratosis", "basal cell carcinoma", "benign keratosis", "histology", "textures"]
    assert (list(data["ood"]), data["convention"]) == (names, "standard")
    assert data["set_kinds"] == dict(zip(names, ["near"] * 3 + ["far"] * 2, strict=True))
    assert (data["fit"]["images"], data["calibration"]["images"], data["id"]["images"]) == (20, 20, 20)
    assert "test: 20 images, not 489." in data["notes"]
    assert data["notes"][0] == "Images are split by lesion: no lesion is in two splits."
    assert (protocol["name"], protocol["title"]) == ("ham-4", "HAM-4")
    assert [(row["set"], row["images"], row["expected"]) for row in protocol["sets"]][:3] == [
        ("train", 20, 1732), ("calibration", 20, 249), ("test", 20, 489),
    ]  # fmt: skip
    frame = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert set(frame.loc[frame["source"] == "id", "label"]) == {
        "melanocytic nevus", "melanoma", "dermatofibroma", "vascular lesion",
    }  # fmt: skip
    assert results["detectors"]["knn"]["per_set"]["histology"]["n"] == 15
    assert results["detectors"]["mcm"]["threshold"] is not None
    assert (tmp_path / "out/report.html").is_file()
    assert "ham-4: 4 classes, 'melanocytic nevus' to 'vascular lesion'" in err


def test_options_come_before_the_protocol_s(packs, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("mole\nmelanoma\ndermatofibroma\nvascular\n")
    place = f"textures={packs / 'histology-colorectal.parquet'}:test"
    argv = ["--protocol", "ham-4", "--root", packs, "--set", place, "--convention", "openood", "--classes"]
    argv += [tmp_path / "names.txt", "--out", tmp_path / "out", "--json"]
    code, out, _ = run(capsys, "evaluate", "--detector", "mcm", *argv)
    results = json.loads(out)
    assert (code, results["data"]["convention"], results["data"]["ood"]["textures"]["images"]) == (0, "openood", 15)
    assert results["data"]["fit"] is None  # nothing learns, so nothing is looked at
    frame = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert "mole" in set(frame.loc[frame["source"] == "id", "label"])


@pytest.fixture
def imagenet(tmp_path):
    """Two classes of ImageNet-1k and its OOD sets, an image each."""
    for name in (
        "imagenet/val/n01440764/a",
        "imagenet/val/n01443537/b",
        "iNaturalist/c",
        "SUN/d",
        "Places/e",
        "dtd/images/f",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (len(name), 99, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_the_convention_is_the_protocol_s(imagenet, capsys):
    argv = ["evaluate", "--detector", "mcm", "--protocol", "imagenet-1k", "--root", imagenet, "--out", imagenet / "out"]
    code, out, _ = run(capsys, *argv, "--json")
    assert (code, json.loads(out)["data"]["convention"]) == (0, "released")
    assert "published_accuracy" not in json.loads(out)["detectors"]["mcm"]  # nothing is known of tiny on ImageNet


def test_a_zero_shot_accuracy_far_from_the_published_one_is_told(imagenet, monkeypatch, capsys):
    row = {"specs": ["tiny"], "templates": "photo", "accuracy": 99.0, "source": "a test"}
    monkeypatch.setattr("ood_core.reproduction.published._imagenet_rows", lambda: [row])
    monkeypatch.setattr("ood_core.reproduction.published.IMAGENET_CLASSES", 2)
    argv = ["evaluate", "--protocol", "imagenet-1k", "--root", imagenet, "--out", imagenet / "out", "--json"]
    code, out, err = run(capsys, *argv, "--detector", "mcm", "msp", "gl_mcm")
    found = json.loads(out)
    assert code == 0
    assert "published_accuracy" not in found["detectors"]["msp"]  # it names no class
    for name in ("mcm", "gl_mcm"):
        record = found["detectors"][name]["published_accuracy"]
        assert record["difference"] == pytest.approx(100 * found["detectors"][name]["accuracy"] - 99)
        assert record["off"]
    assert err.count("Zero-shot accuracy of tiny: 50.00 %, published 99.00 %") == 1
    assert "ood doctor tiny" in found["data"]["notes"][-1]
    assert "ood doctor tiny" in (imagenet / "out" / "report.html").read_text()


def test_a_protocol_of_several_tasks_is_averaged(packs, capsys, tmp_path):
    argv = ["--protocol", "histology-5", "--root", packs, "--out", tmp_path / "out"]
    code, out, _ = evaluate(capsys, *argv)
    summary = json.loads((tmp_path / "out/tasks.json").read_text())
    assert (code, len(summary["tasks"])) == (0, 10)
    each = [json.loads((tmp_path / "out" / task / "results.json").read_text()) for task in summary["tasks"]]
    assert [one["protocol"]["name"] for one in each] == summary["tasks"]
    assert len({json.dumps(one["data"]["ood"]["left out"]) for one in each}) == 10
    for measure in ("auroc", "fpr95"):
        mean = np.mean([one["detectors"]["knn"]["average"][measure] for one in each])
        assert summary["mean"]["knn"][measure] == pytest.approx(mean, abs=1e-12)
    header, row = out.splitlines()[-2:]
    assert header.split() == ["mean", "of", "10", "tasks,", "percent", "AUROC", "FPR95"]
    assert row.split() == ["knn", *(f"{100 * summary['mean']['knn'][m]:.1f}" for m in ("auroc", "fpr95"))]


def test_one_task_is_evaluated_like_a_protocol(packs, capsys, tmp_path):
    argv = ["--protocol", "histology-5-AC+V", "--root", packs, "--out", tmp_path / "out", "--json"]
    code, out, _ = evaluate(capsys, *argv)
    results = json.loads(out)
    assert (code, results["protocol"]["name"]) == (0, "histology-5-AC+V")
    assert results["data"]["ood"]["left out"]["images"] == 6
    assert not (tmp_path / "out/tasks.json").exists()


# ---- mistakes


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--protocol", "ham4", "--root", "PACKS", "--out", "o"], 2, "Unknown protocol 'ham4'. Did you mean 'ham-4'"),
        (["--protocol", "ham-4", "--out", "o"], 2, "`ood evaluate` needs --root."),
        (["--protocol", "ham-4", "--root", "PACKS"], 2, "`ood evaluate` needs --out."),
        (
            ["--protocol", "ham-4", "--root", "PACKS", "--out", "o", "--id", "x"],
            2,
            "--id cannot be used with --protocol",
        ),
        (["--protocol", "ham-4", "--root", "PACKS", "--out", "o", "--set", "x"], 2, "--set 'x' must be NAME=PLACE."),
        (["--protocol", "ham-4", "--root", "PACKS", "--out", "o", "--set", "x=y"], 2, "Unknown image set of protocol"),
        (["--protocol", "ham-4", "--root", "nowhere", "--out", "o"], 3, "There is no folder 'nowhere'"),
        (["--protocol", "imagenet-1k", "--root", "PACKS", "--out", "o"], 3, "test: none of"),
        (["--out", "o"], 2, "`ood evaluate` needs --id, --ood; or take all sets from a benchmark: --protocol NAME"),
        (["--id", "x", "--ood", "y", "--out", "o", "--dry-run"], 2, "--dry-run cannot be used without --protocol"),
        (["--id", "x", "--ood", "y", "--out", "o", "--root", "z"], 2, "--root cannot be used without --protocol"),
    ],
)
def test_mistakes_are_one_sentence(packs, capsys, tmp_path, monkeypatch, argv, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = evaluate(capsys, *(packs if arg == "PACKS" else arg for arg in argv))
    assert (found, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_detector_that_learns_needs_training_images(tmp_path, capsys):
    for name in (
        "imagenet/val/n01440764/a",
        "imagenet/val/n01443537/b",
        "iNaturalist/c",
        "SUN/d",
        "Places/e",
        "dtd/images/f",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    code, _, err = evaluate(capsys, "--protocol", "imagenet-1k", "--root", tmp_path, "--out", tmp_path / "out")
    assert (code, "'knn' must be fitted" in err) == (4, True)
