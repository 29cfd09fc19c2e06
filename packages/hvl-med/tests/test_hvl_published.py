"""The paper's tables as data: complete, in range, and their averages those of their columns but for the listed ones."""

import doctest

import pytest
from ood_core.errors import UsageError
from ood_hvl import reproduce
from ood_hvl.layouts import list_layouts
from ood_hvl.reproduce import published_table

METRICS = ("accuracy", "fpr95", "auroc")
SPREADS = ("fpr95_std", "auroc_std")
HALF = 0.005 + 1e-9


def inconsistent(row, metrics):
    """(metric, printed, mean of the columns) of the averages that do not follow by rounding."""
    for metric in metrics:
        mean = sum(figures[metric] for figures in row["sets"].values()) / len(row["sets"])
        if abs(mean - row["average"][metric]) > HALF:
            yield metric, row["average"][metric], mean


@pytest.mark.parametrize("number", [1, 2])
def test_every_table_names_its_source_and_the_benchmarks(number):
    table = published_table(number)
    assert table["source"] == f"HVL, MICCAI 2025, Table {number}"
    assert (table["unit"], table["note"][-1]) == ("percent", ".")
    assert set(table["titles"]) == set(list_layouts())
    assert all(list(row["sets"]) == list(table["titles"]) for row in table["rows"])


@pytest.mark.parametrize("number", [0, 3, "1.json/.."])
def test_other_tables_are_refused(number):
    with pytest.raises(UsageError, match=r"Unknown table of the paper .* Known: 1, 2\."):
        published_table(number)


def test_table_1_has_every_method_with_deviations():
    rows = published_table(1)["rows"]
    assert [row["method"] for row in rows] == [
        "CoPR", "ViM", "GEN", "NPOS", "LoCoOp", "SCT", "LSN", "GalLop", "HVL",
    ]  # fmt: skip
    assert [row["kind"] for row in rows] == ["image"] * 4 + ["image and text"] * 5
    figures = [figure for row in rows for figure in (*row["sets"].values(), row["average"])]
    assert len(figures) == 9 * 4
    assert all(list(figure) == ["accuracy", "fpr95", "fpr95_std", "auroc", "auroc_std"] for figure in figures)
    assert all(37 < figure["fpr95"] < 90 and 63 < figure["auroc"] < 92 for figure in figures)
    spreads = [figure[name] for row in rows for figure in row["sets"].values() for name in SPREADS]
    assert (min(spreads), max(spreads)) == (0.13, 1.72)
    uni_modal = [[figure["accuracy"] for figure in row["sets"].values()] for row in rows[:3]]
    assert uni_modal == [[97.94, 90.32, 68.08]] * 3


def test_the_targets_of_hvl():
    sets = published_table(1)["rows"][-1]["sets"]
    assert {name: [figure[metric] for metric in METRICS] for name, figure in sets.items()} == {
        "nct-crc": [98.30, 37.59, 90.95],
        "isic-4": [88.43, 56.12, 85.75],
        "skin-40": [72.82, 74.45, 73.33],
    }


def test_exactly_the_listed_averages_of_table_1_do_not_follow_from_their_columns():
    content = published_table(1)
    found = [
        {"method": row["method"], "metric": metric, "printed": printed, "columns": pytest.approx(mean, abs=1e-4)}
        for row in content["rows"]
        for metric, printed, mean in inconsistent(row, (*METRICS, *SPREADS))
    ]
    assert sorted(content["inconsistent_averages"], key=str) == sorted(found, key=str)


def test_averages_of_hvl_follow_and_the_wrong_ones_of_others_are_cut_off_not_rounded():
    rows = published_table(1)["rows"]
    assert not list(inconsistent(rows[-1], METRICS))
    wrong = {
        (row["method"], metric): (printed, mean) for row in rows for metric, printed, mean in inconsistent(row, METRICS)
    }
    assert set(wrong) == {("ViM", "fpr95"), ("GEN", "fpr95"), ("SCT", "fpr95"), ("SCT", "accuracy")}
    assert all(int(mean * 100) / 100 == printed for printed, mean in wrong.values())


def test_averages_of_deviations_do_not_follow_but_for_one():
    rows = published_table(1)["rows"]
    wrong = {(row["method"], metric) for row in rows for metric, *_ in inconsistent(row, SPREADS)}
    every = {(row["method"], metric) for row in rows for metric in SPREADS}
    assert every - wrong == {("HVL", "auroc_std")}


def test_hvl_is_best_in_every_fpr95_and_auroc_of_table_1():
    *others, hvl = ([*row["sets"].values(), row["average"]] for row in published_table(1)["rows"])
    for row in others:
        assert all(ours["fpr95"] < theirs["fpr95"] for ours, theirs in zip(hvl, row, strict=True))
        assert all(ours["auroc"] > theirs["auroc"] for ours, theirs in zip(hvl, row, strict=True))


def test_table_2_has_the_six_combinations_and_ends_with_the_method_of_table_1():
    rows = published_table(2)["rows"]
    assert [(row["ood_loss"], row["entropy_gain"], row["csf"]) for row in rows] == [
        (False, False, False), (False, False, True), (True, False, False),
        (True, True, False), (True, False, True), (True, True, True),
    ]  # fmt: skip
    assert all(list(figure) == list(METRICS) for row in rows for figure in row["sets"].values())
    whole = published_table(1)["rows"][-1]["sets"]
    for name, figure in rows[-1]["sets"].items():
        assert figure == {metric: whole[name][metric] for metric in METRICS}
        assert all(figure["fpr95"] <= row["sets"][name]["fpr95"] for row in rows)
    assert rows[2]["sets"]["nct-crc"] == {"accuracy": 97.72, "fpr95": 62.42, "auroc": 80.39}


def test_example():
    assert doctest.testmod(reproduce) == (0, 1)
