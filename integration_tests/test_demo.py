"""The demo, as a person starts it: files, figures, and detectors that detect."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from ood_core import list_detectors
from sklearn.metrics import roc_auc_score


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-c",
        "from ood_core.cli import main; raise SystemExit(main())",
        "demo",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out, done


@pytest.mark.slow
def test_files_and_figures(demo):
    out, done = demo
    results = json.loads((out / "results.json").read_text())
    frame = pd.read_parquet(out / "scores.parquet")
    assert results["schema"] == 1
    assert set(results["detectors"]) == {*list_detectors(), "fusion"}
    assert results["detectors"]["fusion"]["params"]["members"] == list_detectors()
    assert {"id", "near-combinations"} < set(frame["source"])
    assert (frame["status"] == "ok").all()
    for name, figures in results["detectors"].items():
        assert name in done.stdout
        for source, figure in figures["per_set"].items():
            part = frame[frame["source"].isin(["id", source])]
            assert figure["auroc"] == pytest.approx(roc_auc_score(part["source"] == "id", part[name]), abs=1e-12)
            assert figure["n"] == (frame["source"] == source).sum()
    assert (out / "report.html").stat().st_size > 50_000
    assert len(list((out / "data").glob("*/*/*.png"))) > 1000


@pytest.mark.slow
def test_figures_follow_from_the_scores(demo):
    tool = Path(__file__).parents[1] / "tools" / "check_results.py"
    done = subprocess.run([sys.executable, tool, demo[0]], capture_output=True, text=True, check=True)
    assert f"{len(list_detectors()) + 1} detectors checked" in done.stdout


@pytest.mark.slow
def test_detectors_detect(demo):
    out, _ = demo
    detectors = json.loads((out / "results.json").read_text())["detectors"]
    best = {
        source: max(d["per_set"][source]["auroc"] for d in detectors.values()) for source in detectors["mcm"]["per_set"]
    }
    assert best["near-combinations"] > 0.8
    assert min(best.values()) > 0.8
