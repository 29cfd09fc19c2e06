"""The commands from partition to explain on generated images, in one process."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from ood_core.data import scenes
from ood_mofe.cli import main
from ood_mofe.detectors import MoFE
from ood_mofe.plot import principal_plane
from PIL import Image

NAMES = scenes.ID_CLASSES[:4]
QUICK = ["--dtype", "float32"]
PARAMS = ["experts=2", "epochs=1", "batch_size=12", "augment=false", "head_learning_rate=0.01", "k=3"]
OPTIONS = [*QUICK, *(part for pair in PARAMS for part in ("--param", pair))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 4, 1), ("test", 5, 2)):
        scenes.write_folder(scenes.render(NAMES, count, seed=seed), root / name)
    scenes.write_folder(scenes.textures(6), root / "ood")
    return root


@pytest.fixture(scope="module")
def groups(data):
    """What `partition` wrote."""
    made = ["--out", f"{data}/groups.csv", "--cache", f"{data}/cache"]
    assert main(["partition", f"{data}/train", *OPTIONS, *made]) == 0
    with open(data / "groups.csv", newline="") as table:
        return list(csv.reader(table))


@pytest.fixture(scope="module")
def detector(data, groups):
    """Fitted on these groups, and calibrated."""
    given = ["--param", f"groups={data}/groups.csv", "--calibrate", f"{data}/test", "--cache", f"{data}/cache"]
    assert main(["fit", f"{data}/train", "--out", f"{data}/detector", *OPTIONS, *given]) == 0
    return str(data / "detector")


def run(capsys, *arguments):
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr()


# ---- partition


def test_partition_writes_what_fit_takes(groups, detector):
    assert groups[0] == ["class", "group"]
    assert [name for name, _ in groups[1:]] == sorted(NAMES)
    assert {group for _, group in groups[1:]} == {"0", "1"}
    fitted = MoFE.from_pretrained(detector)
    assert fitted.group.tolist() == [int(group) for _, group in groups[1:]]


def test_partition_finds_the_groups_that_fit_would(data, groups):
    assert main(["fit", f"{data}/train", "--out", f"{data}/own", *OPTIONS]) == 0
    assert MoFE.from_pretrained(data / "own").group.tolist() == [int(group) for _, group in groups[1:]]


def test_partition_prints_and_draws(data, groups, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    plot = tmp_path / "deep" / "groups.png"
    given = ["--cache", f"{data}/cache", "--plot", plot]
    printed = run(capsys, "partition", f"{data}/train", *OPTIONS, *given)
    members = {g: [name for name, own in groups[1:] if own == g] for g in ("0", "1")}
    assert printed.out.splitlines() == [f"group {g}, {len(m)} classes: {', '.join(m)}" for g, m in members.items()]
    assert f"Picture: {plot}" in printed.err
    with Image.open(plot) as picture:
        pixels = np.asarray(picture.convert("RGB"), float)
    for colour in ([0x00, 0x72, 0xB2], [0xE6, 0x9F, 0x00]):
        assert (np.abs(pixels - colour).max(-1) < 30).sum() > 50


def test_partition_of_given_groups_and_more_than_ten(data, tmp_path, capsys):
    file = tmp_path / "mine.csv"
    file.write_text("".join(f"{name},{'a' if number < 3 else 'b'}\n" for number, name in enumerate(sorted(NAMES))))
    given = ["--groups", file, "--cache", f"{data}/cache", "--json"]
    found = json.loads(run(capsys, "partition", f"{data}/train", *OPTIONS, *given).out)
    assert found == {"experts": 2, "groups": [sorted(NAMES)[:3], sorted(NAMES)[3:]], "out": None, "plot": None}
    from ood_mofe.cli import _write_groups
    from ood_mofe.partition import assign_groups

    names, group = [f"class, {i}" for i in range(12)], torch.arange(11, -1, -1)
    _write_groups(tmp_path / "many.csv", names, group)
    assert torch.equal(assign_groups(names, torch.zeros(12, 2), 12, groups=tmp_path / "many.csv"), group)


def test_without_matplotlib_the_remedy_is_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    given = ["--cache", f"{data}/cache", "--plot", f"{tmp_path}/g.png"]
    assert main(["partition", f"{data}/train", *OPTIONS, *given]) == 2
    assert "pip install 'ood-mofe[plot]'" in capsys.readouterr().err


def test_the_principal_plane_is_that_of_the_covariance():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 5, 1, 9, 1, 1])
    points, shares = principal_plane(x)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T))
    assert shares.tolist() == pytest.approx((values[::-1][:2] / values.sum()).tolist(), rel=1e-5)
    expected = (x - x.mean(0)).numpy() @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(points.numpy()), np.abs(expected), atol=1e-4)
    assert torch.equal(principal_plane(x.flip(0))[0], points.flip(0)) or torch.allclose(
        principal_plane(x.flip(0))[0], points.flip(0), atol=1e-9
    )
    one, share = principal_plane(torch.ones(3, 2))
    assert (one.tolist(), share.tolist()) == ([[0, 0]] * 3, [0, 0])


# ---- the detector


def test_fit_saves_a_calibrated_detector_and_no_checkpoint(data, detector):
    assert {path.name for path in (data / "detector").iterdir()} == {
        "config.json", "model.safetensors", "training.json",
    }  # fmt: skip
    config = json.loads((data / "detector" / "config.json").read_text())
    assert config["threshold"] is not None
    assert (config["params"]["experts"], config["backbone"]["spec"]) == (2, "tiny")


def test_score_and_evaluate(data, detector, tmp_path, capsys):
    saved = ["--detector", detector, *QUICK, "--json"]
    rows = json.loads(run(capsys, "score", f"{data}/ood", *saved).out)
    assert len(rows) == 6
    assert {"id", "mofe", "mofe.ood", "mofe.p_value"} <= set(rows[0])
    sets = ["--id", f"{data}/test", "--ood", f"textures={data}/ood"]
    printed = run(capsys, "evaluate", *saved, *sets, "--out", tmp_path)
    found = json.loads(printed.out)["detectors"]
    assert set(found) == {"knn", "knn_global", "msp", "max_logit", "energy", "others", "mos"}
    assert {name for name, figures in found.items() if "threshold" in figures} == {"knn"}
    assert f"ID accuracy {100 * found['knn']['accuracy']:.1f} %" in printed.err
    assert (tmp_path / "report.html").is_file()


def test_explain(data, detector, tmp_path, capsys):
    image, out = next((data / "test").rglob("*.png")), tmp_path / "why.png"
    saved = ["--detector", detector, *QUICK, "--json", "--out", out]
    found = json.loads(run(capsys, "explain", image, *saved, "--train", f"{data}/train").out)
    assert found["predicted"] in NAMES
    assert found["neighbours"][0]["label"] in NAMES
    assert (found["reference"], len(found["id_distances"])) == ("calibration images", 20)
    assert out.is_file()
    found = json.loads(run(capsys, "explain", image, *saved).out)
    assert found["neighbours"][0]["label"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["partition", "{data}/nothing"], 3, "There is no"),
        (["partition", "{data}/ood", "--param", "experts=1"], 2, "at least two classes"),
        (["partition", "{data}/train", "--out", "{tmp}/groups.txt"], 2, "must end in .csv"),
        (["partition", "{data}/train", "--param", "experts=9"], 2, "9 experts are more than the 4 classes"),
        (["partition", "{data}/train", "--param", "experts=2", "--groups", "{tmp}/g.csv"], 3, "There is no file"),
        (["fit", "{data}/train", "--out", "{tmp}/x", "--param", "experts=9"], 2, "9 experts are more"),
        (["fit", "{data}/train", "--out", "{tmp}/x", "--param", "expert=2"], 2, "Did you mean 'experts'"),
        (["explain", "{data}/none.png", "--detector", "{data}/detector"], 3, "There is no image"),
        (
            ["evaluate", "--detector", "{data}/train", "--id", "a", "--ood", "b", "--out", "{tmp}"],
            3,
            "no saved detector",
        ),
    ],
)
def test_mistakes_are_one_sentence(arguments, code, words, data, detector, tmp_path, capsys):
    given = QUICK if arguments[0] != "partition" else [*QUICK, "--cache", f"{data}/cache"]
    assert main([*(argument.format(data=data, tmp=tmp_path) for argument in arguments), *given]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ood-mofe: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []
