"""Compute every figure of a results folder again from its scores.parquet and compare: exit status 1 if one differs.

uv run python tools/check_results.py DIR
"""

import json
import math
import sys
from pathlib import Path

from ood_core.metrics import evaluate_scores
from ood_core.scores import ScoreTable


def main(folder: Path) -> int:
    results = json.loads((folder / "results.json").read_text())
    table = ScoreTable.read(folder / "scores.parquet")
    wrong = 0
    for name, figures in results["detectors"].items():
        sets = {source: table.scores(name, source) for source in figures["per_set"]}
        again = evaluate_scores(table.scores(name, "id"), sets, convention=results["data"]["convention"]).to_dict()
        for where, stored, fresh in [
            ("average", figures["average"], again["average"]),
            *((source, figures["per_set"][source], again["per_set"][source]) for source in sets),
        ]:
            for key in ("auroc", "fpr95"):
                if not math.isclose(stored[key], fresh[key], abs_tol=1e-12):
                    print(f"{name}, {where}: {key} is {stored[key]}, the scores give {fresh[key]}")
                    wrong += 1
    size = (folder / "report.html").stat().st_size
    print(f"{len(results['detectors'])} detectors checked against {len(table.frame)} rows, report of {size} bytes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
