"""How far bfloat16 weights move the AUROC of every detector, on the protocol `tiny-imagenet-100`.

    uv run python benchmarks/bfloat16.py --packs ../shared/data

Slow where the processor has no bfloat16. Writes benchmarks/results/bfloat16.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import publish
from ood_core import create_backbone, list_detectors
from tiny_imagenet_100 import OTHERS, run

RESULT = Path(__file__).parent / "results" / "bfloat16.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True, help="folder with the parquet packs")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--cache", help="feature cache")
    args = parser.parse_args()
    names = [name for name in list_detectors() if name not in OTHERS]
    runs = {
        dtype: run(create_backbone(args.backbone, dtype=dtype), args.packs, names, bootstrap=0, cache=args.cache)
        for dtype in ("float32", "bfloat16")
    }
    detectors = {
        name: {dtype: found["detectors"][name]["average"]["auroc"] for dtype, found in runs.items()} for name in names
    }
    for name, figures in detectors.items():
        print(f"{name:12s} {100 * (figures['bfloat16'] - figures['float32']):+.3f} points")
    publish(RESULT, {"detectors": detectors, "environment": runs["bfloat16"]["environment"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
