"""Finished runs are read back, others refused; figures over runs."""

import json
import statistics

import pytest
from ood_core.errors import UsageError
from ood_core.runs import kept_runs, percent, spread

RECIPE = {"seeds": (0, 1), "options": {"k": 5}}


def never():
    raise AssertionError("it was made again")


def test_a_finished_run_is_read_back(tmp_path):
    file = tmp_path / "deep" / "run.json"
    runs = [{"auroc": 0.1 + 0.2}]
    assert kept_runs(file, RECIPE, lambda: runs) == runs
    assert kept_runs(file, RECIPE, never) == runs
    assert json.loads(file.read_text()) == {"recipe": {"seeds": [0, 1], "options": {"k": 5}}, "runs": runs}


def test_a_run_of_another_recipe_is_refused_and_a_damaged_one_made_again(tmp_path, caplog):
    file = tmp_path / "run.json"
    kept_runs(file, RECIPE, lambda: [])
    with pytest.raises(UsageError, match=r"run\.json is a run with other settings or images: remove it"):
        kept_runs(file, RECIPE | {"options": {"k": 6}}, never)
    for damage in ("{", "[]", '{"runs": []}'):
        file.write_text(damage)
        assert kept_runs(file, RECIPE, lambda: [{"x": 1}]) == [{"x": 1}]
        assert "is damaged" in caplog.messages[-1]
    assert kept_runs(file, RECIPE, never) == [{"x": 1}]


def test_nothing_is_kept_without_a_file(tmp_path):
    assert kept_runs(None, RECIPE, lambda: [{"x": 1}]) == [{"x": 1}]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_no_file(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        kept_runs(tmp_path / "run.json", RECIPE, never)
    assert list(tmp_path.iterdir()) == []


def test_spread():
    values = [0.5, 0.7, 0.9]
    found = spread(values)
    assert found["mean"] == pytest.approx(0.7)
    assert found["std"] == pytest.approx(statistics.stdev(values))
    assert found["high"] - found["mean"] == pytest.approx(4.3027 * 0.2 / 3**0.5, rel=1e-4)  # Student's t, 2 degrees
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"])
    assert found["runs"] == 3
    assert spread([0.5]) == {"mean": 0.5, "std": None, "low": None, "high": None, "runs": 1}
    assert spread([0.5, None]) is None


def test_percent():
    assert percent(spread([0.5, 0.7])) == "60.00±14.14"
    assert percent(spread([0.12345])) == "12.35"
    assert percent(None) == ""
