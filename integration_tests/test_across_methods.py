"""What a method leaves behind, in the hands of another."""

import json
import shutil

import pandas as pd
import pytest
import torch
from ood_core import create_backbone, create_detector, extract
from ood_core.cli import main
from ood_core.data import FewShot, ImageFolder, scenes
from ood_core.detectors.base import Detector
from ood_core.errors import UsageError

pytest.importorskip("ood_iim", reason="ood-iim is not installed")
pytest.importorskip("ood_setar", reason="ood-setar is not installed")
from ood_setar import SeTAREdit

CLASSES = sorted(scenes.ID_CLASSES[:3])
BRIEF = {"epochs": 2, "negative_prompts": 3, "batch_size": 6, "seed": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("train", 1), ("test", 2)):
        scenes.write_folder(scenes.render(scenes.ID_CLASSES[:3], 4, seed=seed), root / name)
    scenes.write_folder(scenes.textures(6), root / "ood")
    return root


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def edit(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    SeTAREdit({"visual.3.up": 0.3, "visual.1.up": 0.4, "text.1.up": 0.3}, tiny.fingerprint).save_pretrained(folder)
    return folder


def test_prompts_learned_on_an_edited_backbone(tiny, edit, data, tmp_path):
    """The saved detector finds its backbone again, edit and all, and takes no other."""
    backbone = create_backbone("tiny", edit=str(edit))
    assert "+edit:" in backbone.spec
    few = FewShot(ImageFolder(data / "train"), 3, 1)
    made = create_detector("iim", backbone=backbone, **BRIEF).fit(few)
    vanilla = create_detector("iim", backbone=tiny, **BRIEF).fit(few)
    scores = made.score(data / "test")
    assert scores.isfinite().all()
    assert not torch.allclose(scores, vanilla.score(data / "test"), rtol=1e-4)
    features = extract(backbone, data / "test", made.needs)
    assert torch.equal(made.score_features(features), scores)

    made.save_pretrained(tmp_path / "detector")
    assert json.loads((tmp_path / "detector" / "config.json").read_text())["backbone"]["spec"] == f"tiny+edit:{edit}"
    loaded = Detector.from_pretrained(tmp_path / "detector")
    assert torch.equal(loaded.score(data / "test"), scores)
    assert loaded.backbone.fingerprint == backbone.fingerprint
    again = Detector.from_pretrained(tmp_path / "detector", backbone=SeTAREdit.from_pretrained(edit).apply(tiny))
    assert torch.equal(again.score(data / "test"), scores)
    with pytest.raises(UsageError, match="was made with backbone"):
        Detector.from_pretrained(tmp_path / "detector", backbone=tiny)
    with pytest.raises(UsageError, match="These features are of backbone 'tiny'"):
        loaded.score_features(extract(tiny, data / "test", made.needs))


def test_a_lost_edit_is_named(tiny, edit, data, tmp_path, capsys):
    """The detector says which folder it misses."""
    shutil.copytree(edit, tmp_path / "edit")
    backbone = create_backbone(f"tiny+edit:{tmp_path / 'edit'}")
    create_detector("s_mcm", backbone=backbone, class_names=CLASSES).save_pretrained(tmp_path / "detector")
    shutil.rmtree(tmp_path / "edit")
    assert main(["score", f"{data}/test", "--detector", str(tmp_path / "detector"), "--json"]) == 3
    error = capsys.readouterr().err
    assert f"tiny+edit:{tmp_path / 'edit'}" in error
    assert f"{tmp_path / 'edit'}: put it back, or pass backbone= (--backbone)" in error
    assert "Traceback" not in error


def test_an_edit_that_drops_nothing_is_the_backbone_bit_for_bit(tiny, data, tmp_path):
    names = [name for name in tiny.linears() if name.endswith((".up", ".query", "projection"))]
    edit = SeTAREdit(dict.fromkeys(names, 0.0), tiny.fingerprint)
    edit.save_pretrained(tmp_path)
    for edited in (edit.apply(tiny), create_backbone(f"tiny+edit:{tmp_path}")):
        assert edited.fingerprint == tiny.fingerprint
        assert all(map(torch.equal, edited.model.state_dict().values(), tiny.model.state_dict().values()))
        ours, expected = (extract(one, data / "test") for one in (edited, tiny))
        assert torch.equal(ours.image, expected.image)
        assert torch.equal(ours.local, expected.local)
        for name in ("mcm", "gl_mcm", "r_mcm", "s_mcm", "energy"):
            one, other = (create_detector(name, backbone=b, class_names=CLASSES) for b in (edited, tiny))
            assert torch.equal(one.score(data / "test"), other.score(data / "test"))
            assert torch.equal(one.score_features(expected), other.score_features(ours))


OPTIONS = {"ratios": [0, 0.3], "order": "visual_only", "scorer": "gl_mcm"}


@pytest.fixture(scope="module")
def setar_scores(tiny, data):
    """Of the images in `test`, by a detector made without a command."""
    detector = create_detector("setar", backbone=tiny, class_names=CLASSES, **OPTIONS).fit(data / "train")
    return detector.score(data / "test").tolist()


def params(options):
    return [f"--param={name}={json.dumps(value)}" for name, value in options.items()]


def test_one_command_fits_and_judges_detectors_of_every_kind(setar_scores, data, tmp_path, capsys):
    """Some learn nothing, some from features, one from images."""
    detectors = ["mcm", "knn", "setar", "iim"]
    options = params(OPTIONS | {"epochs": 1, "negative_prompts": 2, "k": 2})
    sources = ["--fit", f"{data}/train", "--id", f"{data}/test", "--ood", f"far={data}/ood"]
    assert main(["evaluate", "--detector", *detectors, *options, *sources, "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["detectors"]) == set(detectors)
    assert found["detectors"]["setar"]["params"].items() >= OPTIONS.items()
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table[table["source"] == "id"]["setar"].tolist() == setar_scores
    assert table[detectors].notna().all(axis=None)


def test_a_detector_with_an_edit_goes_through_the_commands(setar_scores, data, tmp_path, capsys):
    out = tmp_path / "detector"
    scenes.write_folder(scenes.render(scenes.ID_CLASSES[:3], 8, seed=3), tmp_path / "held")
    sources = ["--fit", f"{data}/train", "--id", f"{tmp_path}/held", "--out", str(out)]
    assert main(["calibrate", "--detector", "setar", *params(OPTIONS), *sources, "--tpr", "0.9"]) == 0
    capsys.readouterr()
    for more in ([], ["--backbone", "tiny"]):
        assert main(["score", f"{data}/test", "--detector", str(out), "--json", *more]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["setar"] for row in rows] == pytest.approx(setar_scores, rel=1e-7)
        assert all(row["setar.ood"] in (0, 1) for row in rows)
