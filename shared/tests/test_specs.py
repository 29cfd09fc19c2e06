"""Where a backbone's files lie, and on what it runs."""

import json
import os
import shutil

import pytest
import timm
import torch
from ood_core import create_backbone, create_detector
from ood_core.backbones import _resolve_device
from ood_core.backbones.specs import located, lost_paths, relative_to
from ood_core.cli import main
from ood_core.detectors.base import Detector
from ood_core.errors import MissingDataError, UsageError
from ood_core.features import FeatureSet
from PIL import Image
from safetensors.torch import save_file


def test_paths_are_found_in_every_kind_of_spec(tmp_path):
    (tmp_path / "clip").mkdir()
    root = str(tmp_path)
    for spec, expected in {
        "hf:clip": f"hf:{root}/clip",
        "hf:openai/clip": "hf:openai/clip",
        "hf:./gone": f"hf:{root}/gone",
        "open_clip:local-dir:clip": f"open_clip:local-dir:{root}/clip",
        "open_clip:ViT-B-16/openai": "open_clip:ViT-B-16/openai",
        "open_clip:ViT-B-16/w.pt": f"open_clip:ViT-B-16/{root}/w.pt",
        "timm:local-dir:clip?num_classes=0": f"timm:local-dir:{root}/clip?num_classes=0",
        "timm:test_vit/a/w.pth?img_size=64": f"timm:test_vit/{root}/a/w.pth?img_size=64",
        "timm:test_vit?img_size=64&checkpoint_path=w.pth": f"timm:test_vit?img_size=64&checkpoint_path={root}/w.pth",
        "timm:test_vit.r160_in1k": "timm:test_vit.r160_in1k",
        "timm:hf-hub:timm/test_vit": "timm:hf-hub:timm/test_vit",
        "tiny+edit:edits/a": f"tiny+edit:{root}/edits/a",
        "tiny+edit:unsaved": "tiny+edit:unsaved",
        "tiny": "tiny",
    }.items():
        assert located(spec, tmp_path) == expected
        assert located(expected, "/") == expected
        assert located(relative_to(expected, tmp_path / "b"), tmp_path / "b") == expected
        assert len(lost_paths(expected)) == (root in expected and f"{root}/clip" not in expected)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with weights and a detector made there by relative paths."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "project"
    (folder / "weights").mkdir(parents=True)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "weights" / "w.safetensors")
    monkeypatch.chdir(folder)
    backbone = create_backbone("timm:test_vit/weights/w.safetensors", dtype="float32")
    monkeypatch.chdir(tmp_path)
    bank = torch.nn.functional.normalize(torch.randn(60, backbone.width, generator=torch.manual_seed(0)), dim=-1)
    features = FeatureSet(
        ids=[str(i) for i in range(60)], image=bank, fingerprint=backbone.fingerprint, backbone=backbone.spec
    )
    create_detector("knn", backbone=backbone, k=1).fit(features).save_pretrained(folder / "detector")
    return folder


def test_a_saved_detector_works_from_any_folder(project, monkeypatch):
    monkeypatch.chdir("/")
    assert Detector.from_pretrained(project / "detector").backbone.spec.endswith("/project/weights/w.safetensors")


def test_a_detector_moved_with_its_weights_finds_them(project, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(project, moved)
    made = Detector.from_pretrained(moved / "detector")
    assert made.backbone.spec == f"timm:test_vit/{moved}/weights/w.safetensors"
    made.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["backbone"]
    assert saved["relative"] == f"timm:test_vit/{os.path.join('..', 'elsewhere', 'weights', 'w.safetensors')}"


def test_weights_that_are_gone_are_named(project, tmp_path, capsys):
    shutil.rmtree(project / "weights")
    with pytest.raises(MissingDataError, match=r"nothing at .*w\.safetensors.*backbone="):
        _ = Detector.from_pretrained(project / "detector").backbone
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
    command = ["score", str(tmp_path / "images"), "--detector", str(project / "detector"), "--out", "x.parquet"]
    assert main(command) == 3
    assert "there is nothing at" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "hpu", "xpu:3"])
def test_devices_that_are_not_there_give_a_sentence(device, monkeypatch):
    for kind in ("mps", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 0)
    with pytest.raises(UsageError, match=r"use 'cpu'"):
        create_backbone("tiny", device=device)
    with pytest.raises(UsageError, match="Unknown device"):
        create_backbone("tiny", device=None)


def test_devices_that_are_there_are_taken(monkeypatch):
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    assert _resolve_device("mps").type == "mps"
    assert _resolve_device("xpu:1") == torch.device("xpu:1")
    with pytest.raises(UsageError, match=r"'xpu:2' is not there \(2 XPU"):
        _resolve_device("xpu:2")
