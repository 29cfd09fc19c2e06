"""The paper's tables as data: complete, and inconsistent exactly where it is known."""

import doctest

import pytest
from ood_core.errors import UsageError
from ood_core.protocols import find_protocol, list_protocols
from ood_mofe import reproduce
from ood_mofe.reproduce import TABLES, published_table

METRICS = ("fpr95", "auroc")
SETS = ["iNaturalist", "Places", "SUN", "Texture"]
OURS = "MoFE + D-beta Mixup"


def rows(number, backbone=None):
    return {row["method"]: row for row in published_table(number)["rows"] if backbone in (None, row.get("backbone"))}


def mean(row, metric):
    return sum(figures[metric] for figures in row["sets"].values()) / len(row["sets"])


def averages(number):
    return {method: row["average"] for method, row in rows(number).items()}


@pytest.mark.parametrize("number", range(1, 7))
def test_every_table_names_its_source(number):
    table = published_table(number)
    assert table["source"] == f"MoFE, ICCV 2025, Table {number}"
    assert table["id"] == ("ImageNet-100" if number == 2 else "ImageNet-1k")
    assert (table["unit"], table["note"][-1]) == ("percent", ".")
    assert ("backbone" in table) == (number > 2)


@pytest.mark.parametrize("number", [0, 7, "1.json/.."])
def test_other_tables_are_refused(number):
    with pytest.raises(UsageError, match=r"Unknown table of the paper .* Known: 1, 2, 3, 4, 5, 6\."):
        published_table(number)


@pytest.mark.parametrize("number", range(1, 7))
def test_our_rows_have_the_papers_names(number):
    ours = set(TABLES[number]) - {"naive fine-tuning"}
    theirs = set(rows(number)) | ({"baseline"} if number == 4 else set())
    if number > 2:
        assert ours == theirs
    else:
        assert ours - {"MOS"} <= theirs
        assert "MOS" in rows(1)


def test_tables_1_and_2_have_every_method():
    clip = ["Energy", "MSP", "MaxLogit", "MCM", "CLIPN", "LSN", "NegPrompt", OURS]
    assert list(rows(1, "CLIP")) == clip
    assert list(rows(1, "DINOv2")) == ["MSP", "MaxLogit", "Energy", "KNN", "MOS", OURS]
    assert list(rows(2, "CLIP")) == ["MSP", "MCM", "CLIPN", "LSN", OURS]
    assert list(rows(2, "DINOv2")) == ["MSP", "MaxLogit", "Energy", "KNN", OURS]
    for number in (1, 2):
        table = published_table(number)
        assert list(table["titles"]) == SETS
        for row in table["rows"]:
            assert list(row["sets"]) == SETS
            figures = [*row["sets"].values(), row["average"]]
            assert all(2 < f["fpr95"] < 69 and 74 < f["auroc"] < 99.3 for f in figures)
            assert 66 < row["accuracy"] < 97


def test_the_targets_on_dinov2():
    large, small = rows(1, "DINOv2")[OURS], rows(2, "DINOv2")[OURS]
    assert [list(f.values()) for f in large["sets"].values()] == [
        [2.74, 98.82], [24.32, 93.73], [17.38, 95.65], [18.58, 95.38],
    ]  # fmt: skip
    assert (large["average"], large["accuracy"]) == ({"fpr95": 17.01, "auroc": 95.89}, 86.40)
    assert (small["average"], small["accuracy"]) == ({"fpr95": 8.10, "auroc": 97.75}, 96.94)


def test_exactly_the_listed_averages_do_not_follow_from_their_columns():
    wrong = {}
    for number in (1, 2):
        found = [
            {"backbone": row["backbone"], "method": row["method"], "metric": metric}
            | {"printed": row["average"][metric], "columns": pytest.approx(mean(row, metric), abs=1e-4)}
            for row in published_table(number)["rows"]
            for metric in METRICS
            if abs(mean(row, metric) - row["average"][metric]) > 0.01 + 1e-9  # neither rounded nor cut off
        ]
        assert published_table(number)["inconsistent_averages"] == found
        wrong |= {(number, *list(one.values())[:3]): one["printed"] for one in found}
    assert wrong == {
        (1, "CLIP", "NegPrompt", "auroc"): 94.81,
        (1, "CLIP", OURS, "auroc"): 94.89,
        (1, "DINOv2", "MSP", "fpr95"): 48.13,
        (1, "DINOv2", OURS, "fpr95"): 17.01,
        (2, "CLIP", "MSP", "fpr95"): 31.43,
        (2, "DINOv2", "Energy", "fpr95"): 48.21,
    }
    assert mean(rows(1, "DINOv2")[OURS], "fpr95") == pytest.approx(15.755)


def test_columns_that_repeat_or_are_exchanged():
    energy, mcm = rows(1, "CLIP")["Energy"]["sets"], rows(1, "CLIP")["MCM"]["sets"]
    assert energy["Texture"] == energy["Places"]
    assert (mcm["Places"]["fpr95"], mcm["SUN"]["fpr95"]) == (37.59, 44.69)


def test_ablations_agree_with_each_other_and_not_with_the_baseline_of_table_1():
    parts, grouping, mixup = averages(3), averages(5), averages(6)
    baseline = parts["baseline"]
    assert baseline == grouping["baseline"] == mixup["baseline"] == {"fpr95": 29.27, "auroc": 92.67}
    assert rows(1, "DINOv2")["KNN"]["average"] == {"fpr95": 28.34, "auroc": 92.18}
    assert grouping["both"] == parts["+ MoFE"]
    assert mixup["full"] == parts["+ D-beta"]
    assert parts["both"] == rows(1, "DINOv2")[OURS]["average"]
    # The text says 5.41.
    assert baseline["fpr95"] - mixup["full"]["fpr95"] == pytest.approx(5.42)


def test_gains_are_those_of_the_full_method():
    gains = {row["experts"]: row["gain"] for row in published_table(4)["rows"]}
    assert gains == {2: 4.10, 3: 6.30, 5: 9.80, 7: 12.26, 8: 12.10, 9: 12.09}
    parts = averages(3)
    assert gains[7] == pytest.approx(parts["baseline"]["fpr95"] - parts["both"]["fpr95"])
    mos = rows(1, "DINOv2")["MOS"]["average"]["fpr95"]
    assert mos - parts["both"]["fpr95"] == pytest.approx(9.39)
    knn, ours = (rows(2, "DINOv2")[name]["average"] for name in ("KNN", OURS))  # the text has 4.40 and 0.23
    assert [abs(knn[m] - ours[m]) for m in METRICS] == pytest.approx([5.32, 1.09])


def test_columns_are_sets_of_the_protocols(tmp_path):
    assert {"imagenet-1k", "imagenet-100"} <= set(list_protocols())
    with pytest.raises(FileNotFoundError) as missing:
        find_protocol("imagenet-100", tmp_path)
    assert all(f"{name}: none of" in str(missing.value) for name in SETS)


def test_example():
    assert doctest.testmod(reproduce) == (0, 1)
