"""The paper's tables as data: complete, in range, and their averages those of their columns but for the listed ones."""

import json
from collections import Counter
from importlib.resources import files

import pytest

OOD = ["iNaturalist", "SUN", "Places", "Texture"]


def table(number):
    return json.loads((files("ood_iim") / "published" / f"table{number}.json").read_text(encoding="utf-8"))


def hundredths(value):
    return round(100 * value)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_table_names_its_source(number):
    assert table(number)["source"] == f"IIM, AAAI 2026, Table {number}"


def test_table_1_has_every_method_of_every_benchmark():
    rows = table(1)["rows"]
    methods = {
        0: ["MCM", "GL-MCM", "R-MCM*"],
        4: ["LoCoOp", "Local-Prompt", "IIM"],
        16: ["LoCoOp", "Local-Prompt", "IIM"],
    }
    for name in ("ImageNet-1k", "ImageNet-500-Easy", "ImageNet-500-Hard", "ImageNet-100"):
        own = "IIM*" if name == "ImageNet-100" else "IIM"
        expected = [(shots, own if m == "IIM" else m) for shots, listed in methods.items() for m in listed]
        assert [(row["shots"], row["method"]) for row in rows if row["id"] == name] == expected
    assert len(rows) == 36
    assert all(list(row["ood"]) == OOD for row in rows)
    values = [value for row in rows for pair in (*row["ood"].values(), row["average"]) for value in pair.items()]
    assert Counter(metric for metric, _ in values) == {"fpr95": 180, "auroc": 180}
    assert all(0 < value < 100 and hundredths(value) / 100 == value for _, value in values)
    assert all(value > 80 for metric, value in values if metric == "auroc")


def test_exactly_the_listed_averages_of_table_1_do_not_follow_from_their_columns():
    content, found = table(1), []
    for row in content["rows"]:
        for metric in ("fpr95", "auroc"):
            total = sum(hundredths(row["ood"][name][metric]) for name in OOD)
            if abs(total - 4 * hundredths(row["average"][metric])) > 2:  # half a hundredth of the mean of four
                key = {name: row[name] for name in ("id", "shots", "method")}
                printed = row["average"][metric]
                found.append({**key, "metric": metric, "printed": printed, "columns": total / 400})
    assert found == content["inconsistent_averages"]
    assert len(found) == 5


def test_the_whole_loss_of_table_2_is_the_4_shot_row_of_table_1():
    content = table(2)
    (row,) = [
        row
        for row in table(1)["rows"]
        if (row["id"], row["shots"], row["method"]) == (content["id"], content["shots"], "IIM")
    ]
    best = content["rows"][-1]
    assert {metric: best[metric] for metric in ("fpr95", "auroc")} == row["average"]
    assert all(best[part] for part in ("hard_negative_mining", "negative_prompts", "diversity_loss"))
    assert all(other["fpr95"] > best["fpr95"] and other["auroc"] < best["auroc"] for other in content["rows"][:-1])
    switches = ("hard_negative_mining", "negative_prompts", "negative_loss", "diversity_loss")
    assert len({tuple(other[name] for name in switches) for other in content["rows"]}) == 7
    assert {other["negative_loss"] for other in content["rows"]} == {None, "next", "all"}


def test_the_times_of_table_3_fit_the_images_of_one_benchmark():
    images = set()
    for row in table(3)["rows"]:
        batches = row["total_minutes"] * 60_000 / row["batch_milliseconds"] / row["epochs"]
        images.add(round(batches * row["batch_size"], -2))
    # About 2,000 images, 500 classes with 4 shots, in every row: no figure is in the wrong column.
    assert images <= {1700, 1800, 1900, 2000, 2100, 2200}
