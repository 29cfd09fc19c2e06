"""The paper's tables as data: complete, in range, and their averages those of their columns but for the listed ones."""

import pytest
from ood_core.errors import UsageError
from ood_core.protocols import list_protocols
from ood_core.protocols.catalog import catalog
from ood_setar.reproduce import published_table

FAR = ["iNaturalist", "SUN", "Places", "Texture"]
METRICS = ("fpr95", "auroc")
HALF = 0.005 + 1e-9


def average(figures, metric):
    given = [figure[metric] for figure in figures.values() if figure]
    return sum(given) / len(given)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_table_names_its_source_and_has_a_note(number):
    table = published_table(number)
    assert table["source"] == f"SeTAR, NeurIPS 2024, Table {number}"
    assert (table["unit"], table["note"][-1]) == ("percent", ".")


@pytest.mark.parametrize("number", [0, 5, "1.json/.."])
def test_other_tables_are_refused(number):
    with pytest.raises(UsageError, match=r"Unknown table of the paper .* Known: 1, 2, 3, 4\."):
        published_table(number)


def test_rows_are_of_the_protocols():
    known = catalog()["protocols"]
    ood = {known[name]["id"]: list(known[name]["ood"]) for name in list_protocols() if name.startswith("setar-")}
    assert published_table(3)["ood"] == ood
    assert all(list(row["ood"]) == ood[row["id"]] for row in published_table(1)["rows"])
    assert {row["id"] for number in (1, 2, 3, 4) for row in published_table(number)["rows"]} == set(ood)


def test_table_1_has_every_method_of_every_benchmark():
    rows = published_table(1)["rows"]
    methods = [("vanilla", "cited"), ("vanilla", "rerun"), ("SeTAR", None)]
    expected = [
        (id, score, *method) for id in ("ImageNet1K", "Pascal-VOC") for score in ("mcm", "gl_mcm") for method in methods
    ]
    assert [(row["id"], row["score"], row["method"], row["origin"]) for row in rows] == expected
    absent = [
        (row["id"], row["origin"], name) for row in rows for name, figures in row["ood"].items() if figures is None
    ]
    assert absent == [("Pascal-VOC", "cited", "Places")] * 2
    figures = [figure for row in rows for figure in (*row["ood"].values(), row["average"]) if figure]
    assert len(figures) == 6 * 5 + 6 * 7 - 2
    assert all(0 < figure["fpr95"] < 60 and 80 < figure["auroc"] < 100 for figure in figures)


def test_exactly_the_listed_average_of_table_1_does_not_follow_from_its_columns():
    content, found = published_table(1), []
    for row in content["rows"]:
        for metric in METRICS:
            columns, printed = average(row["ood"], metric), row["average"][metric]
            if abs(columns - printed) > HALF:
                key = {name: row[name] for name in ("id", "score", "method", "origin")}
                found.append({**key, "metric": metric, "printed": printed, "columns": pytest.approx(columns)})
    assert content["inconsistent_averages"] == found
    assert [entry["printed"] for entry in found] == [35.47]
    assert "35.47" in content["note"]


def test_setar_is_better_than_the_rerun_in_every_average_of_tables_1_and_3():
    rows = published_table(1)["rows"]
    pairs = [(row["average"], other["average"]) for row, other in zip(rows[1::3], rows[2::3], strict=True)] + [
        (row["average"]["vanilla"], row["average"]["SeTAR"]) for row in published_table(3)["rows"]
    ]
    assert len(pairs) == 4 + 7
    assert all(setar["fpr95"] < vanilla["fpr95"] and setar["auroc"] > vanilla["auroc"] for vanilla, setar in pairs)


def test_table_2_has_the_methods_of_three_models_and_deviations_of_its_own_runs():
    rows = published_table(2)["rows"]
    methods = {
        "CLIP ViT-B/16": ["NPOS", "CoOp", "LoCoOp", "LoCoOp", "LoRA", "SeTAR+FT"],
        "CLIP ViT-L/14": ["LoCoOp", "LoRA", "SeTAR+FT"],
        "SwinV2-B": ["LoRA", "SeTAR+FT"],
    }
    for backbone, expected in methods.items():
        ours = [row for row in rows if row["backbone"] == backbone]
        assert [row["method"] for row in ours] == expected
        scores = ["msp", "energy"] if backbone == "SwinV2-B" else ["mcm", "gl_mcm"]
        assert all(list(row["scores"]) == scores for row in ours)
        best = ours[-1]["scores"]
        others = [row["scores"] for row in ours[:-1]]
        assert all(best[score]["fpr95"] < other[score]["fpr95"] for other in others for score in scores)
        assert all(best[score]["auroc"] > other[score]["auroc"] for other in others for score in scores)
    for row in rows:
        own = dict.fromkeys(METRICS, row["origin"] != "cited")
        assert all({m: f"{m}_std" in figures for m in METRICS} == own for figures in row["scores"].values())
    assert [row["origin"] for row in rows].count("cited") == 3
    assert published_table(2)["ood"] == FAR


def test_table_3_has_the_models_and_scores_that_table_1_lacks():
    assert [(row["id"], row["backbone"], row["score"]) for row in published_table(3)["rows"]] == [
        ("ImageNet1K", "CLIP ViT-B/16", "neg_label"),
        ("ImageNet1K", "CLIP ViT-L/14", "mcm"),
        ("ImageNet1K", "CLIP ViT-L/14", "gl_mcm"),
        ("ImageNet1K", "SwinV2-B", "msp"),
        ("ImageNet1K", "SwinV2-B", "energy"),
        ("Pascal-VOC", "CLIP ViT-L/14", "mcm"),
        ("Pascal-VOC", "CLIP ViT-L/14", "gl_mcm"),
    ]


def test_exactly_the_listed_average_of_table_4_does_not_follow_from_its_columns():
    content, found = published_table(4), []
    assert [row["method"] for row in content["rows"]] == ["vanilla", "LoCoOp", "LoRA", "SeTAR", "SeTAR+FT"]
    for row in content["rows"]:
        assert list(row["accuracy"]) == ["ImageNet1K", "SUN", "Places", "Texture"]
        columns = sum(row["accuracy"].values()) / 4
        if abs(columns - row["average"]) > HALF:
            printed = {"printed": row["average"], "columns": pytest.approx(columns)}
            found.append({"method": row["method"], "metric": "accuracy", **printed})
    assert content["inconsistent_averages"] == found
    assert [entry["printed"] for entry in found] == [57.2]
    assert "57.20" in content["note"]
