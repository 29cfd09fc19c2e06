"""How far bfloat16 weights move the AUROC: two results of benchmarks/tiny_imagenet_100.py side by side.

    uv run python benchmarks/tiny_imagenet_100.py --packs ../shared/data --dtype float32 --out a.json
    uv run python benchmarks/tiny_imagenet_100.py --packs ../shared/data --dtype bfloat16 --out b.json
    uv run python benchmarks/bfloat16.py a.json b.json

Writes benchmarks/results/bfloat16.json.
"""

import json
import sys
from pathlib import Path

from ood_core._files import write_json


def main(float32: str, bfloat16: str) -> None:
    runs = {"float32": json.loads(Path(float32).read_text()), "bfloat16": json.loads(Path(bfloat16).read_text())}
    for dtype, run in runs.items():
        found = run["environment"]["backbones"][0]["dtype"]
        if found != dtype:
            raise SystemExit(
                f"The {dtype} result was made with {found}: give the files in the order float32, bfloat16."
            )
    detectors = {
        name: {dtype: run["detectors"][name]["average"]["auroc"] for dtype, run in runs.items()}
        for name in runs["float32"]["detectors"]
    }
    for name, figures in detectors.items():
        print(f"{name:12s} {100 * (figures['bfloat16'] - figures['float32']):+.3f} points")
    out = Path(__file__).parent / "results" / "bfloat16.json"
    write_json(out, {"detectors": detectors, "environment": runs["bfloat16"]["environment"]})


if __name__ == "__main__":
    main(*sys.argv[1:])
