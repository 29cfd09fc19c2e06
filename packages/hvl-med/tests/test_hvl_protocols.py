"""The medical benchmarks as protocols of the core's commands."""

import csv
import json

import numpy as np
import pytest
from ood_core.cli import main
from ood_core.errors import UsageError
from ood_core.protocols import find_protocol, find_tasks, inspect_protocol, list_protocols, summarise_protocol
from ood_hvl.layouts import OOD_TRIPLES, find_layout, list_layouts
from PIL import Image

TISSUES = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
DISEASES = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"]


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(path)


@pytest.fixture
def nct(tmp_path):
    for part, count in (("NCT-CRC-HE-100K", 3), ("CRC-VAL-HE-7K", 2)):
        for number, tissue in enumerate(TISSUES):
            for i in range(count):
                write_image(tmp_path / part / tissue / f"{tissue}_{i}.tif", 10 * number + i)
    return tmp_path


@pytest.fixture
def isic(tmp_path):
    """Six images and lesions of every disease."""
    rows = [["image", *DISEASES, "UNK"]]
    for number, disease in enumerate(DISEASES):
        for i in range(6):
            write_image(tmp_path / f"ISIC_2019_Training_Input/ISIC_{number}{i}.jpg", 10 * number + i)
            rows.append([f"ISIC_{number}{i}", *(int(disease == other) for other in DISEASES), 0])
    tables = {"GroundTruth": rows, "Metadata": [["image", "lesion_id"], *([row[0], f"L{row[0]}"] for row in rows[1:])]}
    for name, content in tables.items():
        with open(tmp_path / f"ISIC_2019_Training_{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(content)
    return tmp_path


def test_every_layout_is_a_protocol():
    assert set(list_layouts()) <= set(list_protocols())
    assert summarise_protocol("nct-crc")["sets"] == dict.fromkeys(map("+".join, OOD_TRIPLES), "near")
    assert [summarise_protocol(name)["title"] for name in list_layouts()] == ["ISIC-4", "Skin-40", "NCT-CRC"]


def test_tasks_are_those_of_the_layout(nct):
    layout, tasks = find_layout("nct-crc", nct), find_tasks("nct-crc", nct)
    assert [task.name for task in tasks] == [f"nct-crc-{'+'.join(triple)}" for triple in OOD_TRIPLES]
    for task, own in zip(tasks, layout.tasks, strict=True):
        assert (task.class_names, task.notes) == (own.class_names, own.notes)
        assert (task.train.ids, task.test.ids) == (own.train.ids, own.test.ids)
        assert (task.train.labels.tolist(), task.test.label_names) == (own.train.labels.tolist(), own.class_names)
        assert {name: source.ids for name, source in task.ood.items()} == {n: s.ids for n, s in own.ood.items()}
        assert task.kinds == dict.fromkeys(own.ood, "near")
    assert [row.expected for row in inspect_protocol("nct-crc", nct)] == [100_000, 7_180]
    assert find_protocol("nct-crc-LYM+MUC+MUS", nct).class_names == tasks[1].class_names
    with pytest.raises(UsageError, match=r"Unknown task of protocol 'nct-crc' 'nct-crc-ADI'\. Did you mean"):
        find_protocol("nct-crc-ADI", nct)


def test_a_fold_is_evaluated_from_the_command_line(isic, tmp_path, capsys):
    argv = ["evaluate", "--protocol", "isic-4-grouped-1", "--root", str(isic)]
    assert main([*argv, "--detector", "knn", "--param", "k=1", "--out", str(tmp_path / "out"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["protocol"]["name"] == "isic-4-grouped-1"
    data = results["data"]
    assert data["ood"]["BCC+AK+BKL+SCC"]["images"] == data["fit"]["images"] + data["id"]["images"] == 24
    assert "The folds are grouped: no lesion is in both train and test." in results["data"]["notes"]
    assert "NV: 6, not 12,875." in results["data"]["notes"]
    assert main([*argv[:2], "isic-4", *argv[3:], "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == [f"isic-4-grouped-{i}" for i in range(1, 6)]
    assert main([*argv[:2], "skin-40", *argv[3:], "--dry-run"]) == 3
