"""Our figures beside published ones: differences, flags, and the accuracies that tell a wrong network."""

import json
import re
from importlib.resources import files
from types import SimpleNamespace

import open_clip
import pytest
from ood_core import create_detector, extract
from ood_core.data import open_source
from ood_core.detectors.base import right_predictions
from ood_core.errors import MissingDataError, UsageError
from ood_core.protocols.sets import FoundSet
from ood_core.reproduction.command import print_differences
from ood_core.reproduction.published import accuracy_beside, imagenet_accuracy, zero_shot_beside
from ood_core.reproduction.studies import Bench
from ood_core.reproduction.tables import MARGIN, Beside, beside, difference_cells, figure_cell, legend, published_table

ROWS = json.loads((files("ood_core.reproduction") / "imagenet_zero_shot.json").read_text())["rows"]


def test_only_what_both_have_is_compared():
    ours = {"SUN": {"auroc": 90.0, "fpr95": 40.0}, "mine": {"auroc": 1.0}}
    found = beside("MCM", ours, {"SUN": {"auroc": 92.57, "fpr95": None}, "Places": {"auroc": 89.0}})
    assert [(one.place, one.measure) for one in found] == [("SUN", "auroc")]
    assert found[0].difference == pytest.approx(-2.57)
    assert found[0].off
    assert found[0].to_dict()["difference"] == -2.57


@pytest.mark.parametrize(
    ("difference", "off"), [(0, False), (MARGIN, False), (-MARGIN, False), (1.51, True), (-9, True)]
)
def test_figures_are_flagged_beyond_the_margin_in_either_direction(difference, off):
    assert Beside("x", "y", "auroc", 50 + difference, 50).off == off


def test_cells_follow_the_columns():
    found = [Beside("MCM", "SUN", "auroc", 90, 92.57), Beside("MCM", "SUN", "fpr95", 40, 39)]
    assert difference_cells(found, ["Places", "SUN"], ["fpr95", "auroc"]) == ["", "+1.00 / -2.57!"]
    assert "1 of 2 figures is more" in legend(found)
    assert legend(found[1:]) == "All 1 figures are within 1.5 points of the published ones."
    assert "most: MCM, SUN, fpr95 by +9.00" in legend([*found, Beside("MCM", "SUN", "fpr95", 48, 39)])
    assert legend([]).startswith("No published figure")


def test_published_accuracies_are_of_names_that_open_clip_knows_and_each_of_one_figure():
    seen = set()
    for row in ROWS:
        assert 20 < row["accuracy"] < 90
        for spec in row["specs"]:
            assert (spec, row["templates"]) not in seen
            seen.add((spec, row["templates"]))
            library, _, name = spec.partition(":")
            if library == "open_clip":
                assert tuple(name.split("/")) in open_clip.list_pretrained()
    known = {f"open_clip:{model}/{tag}" for model, tag in open_clip.list_pretrained() if tag == "openai"}
    assert known <= {spec for spec, _ in seen}


def test_the_figure_of_the_same_prompts_is_preferred():
    spec = "open_clip:ViT-B-16/openai"
    assert imagenet_accuracy(spec, "imagenet") == {**imagenet_accuracy(spec, "imagenet"), "accuracy": 68.34}
    assert imagenet_accuracy(spec, "a photo of a {}.")["accuracy"] == 66.73
    assert imagenet_accuracy(spec, "a photo of a {}.")["same_prompts"]
    assert not imagenet_accuracy(spec, "a drawing of a {}")["same_prompts"]
    assert imagenet_accuracy("hf:openai/clip-vit-base-patch16", "imagenet")["accuracy"] == 68.34
    assert imagenet_accuracy("tiny", "imagenet") is None
    assert imagenet_accuracy(f"{spec}+edit:somewhere", "imagenet") is None


def test_the_loss_of_a_wrong_activation_is_told():
    record, sentence = accuracy_beside("open_clip:ViT-B-16/openai", "imagenet", 0.6434)
    assert record["off"]
    assert record["difference"] == -4.0
    assert "64.34 %, published 68.34 % (difference -4.00)" in sentence
    assert "ood doctor open_clip:ViT-B-16/openai" in sentence
    record, sentence = accuracy_beside("open_clip:ViT-B-16/openai", "imagenet", 0.6812)
    assert not record["off"]
    assert "doctor" not in sentence
    assert "other prompts" in accuracy_beside("open_clip:ViT-L-14/openai", "a photo of a {}", 0.74)[1]
    assert accuracy_beside("tiny", "imagenet", 0.5) == ({}, "")


def test_the_zero_shot_accuracy_is_measured_where_one_is_published(monkeypatch, small_backbone, image_folder):
    source = open_source(image_folder)
    names = source.label_names
    detector = create_detector("mcm", backbone=small_backbone, class_names=names)
    accuracy = right_predictions(detector, extract(small_backbone, source, {"image"})).float().mean().item()
    assert zero_shot_beside(small_backbone, source, names) == ({}, "")
    monkeypatch.setattr("ood_core.reproduction.published.IMAGENET_CLASSES", len(names))
    assert zero_shot_beside(small_backbone, source, names) == ({}, "")  # nothing is published of it
    known = {"accuracy": 90.0, "templates": "imagenet", "source": "a table", "same_prompts": True}
    monkeypatch.setattr("ood_core.reproduction.published.imagenet_accuracy", lambda spec, template=None: known)
    record, sentence = zero_shot_beside(small_backbone, source, names, needs={"image", "local"})
    assert record["measured"] == pytest.approx(100 * accuracy)
    assert record["off"] == (abs(100 * accuracy - 90) > MARGIN)
    assert sentence.startswith(f"Zero-shot accuracy of {small_backbone.spec}: {100 * accuracy:.2f} %")
    assert zero_shot_beside(small_backbone, source, names[:-1]) == ({}, "")


def test_printed_differences_have_the_columns_that_are_there(capsys):
    found = [
        Beside("A", "SUN", "fpr95", 40, 39),
        Beside("A", "SUN", "auroc", 90, 92.57),
        Beside("B", "acc", "acc", 1, 2),
    ]
    print_differences(found, ["Places", "SUN", "acc"], ["fpr95", "auroc", "acc"])
    printed = capsys.readouterr()
    assert [line.split("  ")[0] for line in printed.out.splitlines()] == ["ours - published, points", "A", "B"]
    assert re.split("  +", printed.out.splitlines()[0])[1:] == ["SUN: fpr95 / auroc", "acc"]
    assert "Places" not in printed.out
    assert "+1.00 / -2.57!" in printed.out
    assert "1 of 3 figures is more than 1.5 points" in printed.err
    print_differences([], ["SUN"], ["auroc"])
    assert capsys.readouterr().out == ""


def test_a_papers_table_is_read_from_the_methods_package(tmp_path, monkeypatch):
    folder = tmp_path / "method_with_tables" / "published"
    folder.mkdir(parents=True)
    (tmp_path / "method_with_tables/__init__.py").write_text("")
    (folder / "table2.json").write_text('{"rows": []}')
    monkeypatch.syspath_prepend(tmp_path)
    assert published_table("method_with_tables", 2) == {"rows": []}
    with pytest.raises(UsageError, match=r"Unknown table of the paper '3'.*2"):
        published_table("method_with_tables", 3)


@pytest.mark.parametrize(
    ("figures", "cell"),
    [
        (None, ""),
        ({"fpr95": 30.0, "auroc": 92.5}, "30.00 / 92.50"),
        ({"fpr95": 30.0, "fpr95_std": 0.5, "auroc": 92.5}, "30.00+-0.50 / 92.50"),
    ],
)
def test_a_published_figure_has_its_deviation_where_there_is_one(figures, cell):
    assert figure_cell(figures, apart="+-") == cell


def test_a_bench_without_training_images_says_which_and_how_to_give_them(tmp_path, small_backbone):
    found = FoundSet("train", None, 0, None, MissingDataError("train: none is here."))
    protocol = SimpleNamespace(name="some-protocol", train=None, found=[found])
    with pytest.raises(MissingDataError, match="some-protocol has no training images: --set train=DIR"):
        Bench(protocol, small_backbone, tmp_path).train()
