"""All methods and their fusions on photographs and on dermoscopy, in one table with intervals.

    uv run python benchmarks/together.py --packs ../shared/data --work ~/.cache/ood-together

Every detector of every package on the protocols `tiny-imagenet-100` and `ham-4`, with the options that the demo gives
it (chosen there, not here), and fusions that were named before any of them ran. Detectors are fitted on the protocol's
training images and calibrated, as the fusions are, on its calibration images. Test sets are cut to --images each, drawn
with seed 0, since HVL looks at every image six times. Fitted detectors and features are kept in --work. Writes
benchmarks/results/together.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import publish
from ood_core import Fusion, create_backbone, create_detector, evaluate, list_detectors
from ood_core.backbones.base import Backbone
from ood_core.data.sources import ImageSource
from ood_core.detectors import detector_class
from ood_core.detectors.base import Detector
from ood_core.evaluation import environment, fit_detectors
from ood_core.protocols import Protocol, find_protocol

RESULT = Path(__file__).parent / "results" / "together.json"
PAPERS = ("iim", "setar", "hvl", "mofe")


def fitted(protocol: Protocol, backbone: Backbone, work: Path) -> dict[str, Detector]:
    """Every detector, read back if it was fitted before."""
    found: dict[str, Detector] = {}
    for name in list_detectors():
        folder = work / protocol.name / "detectors" / name
        if not folder.exists():
            options = {"class_names": protocol.class_names, **detector_class(name).demo_options}
            detector = create_detector(name, backbone=backbone, **options)
            fit_detectors({name: detector}, protocol.train, cache=work / "features", progress=False)
            detector.save_pretrained(folder)
            print(f"{protocol.name}: {name} is fitted", flush=True)
        found[name] = Detector.from_pretrained(folder, backbone=backbone)
    return found


def fusions(members: dict[str, Detector]) -> dict[str, Detector]:
    papers = {name: members[name] for name in PAPERS}
    return {
        "fusion of all, mean": Fusion(members),
        "fusion of all, Fisher": Fusion(members, combine="fisher"),
        "fusion of all, minimum": Fusion(members, combine="min"),
        "fusion of iim, setar, hvl, mofe, mean": Fusion(papers),
        "fusion of mcm and mahalanobis, mean": Fusion({name: members[name] for name in ("mcm", "mahalanobis")}),
    }


def some(source: ImageSource, count: int) -> ImageSource:
    return source.subset(np.sort(np.random.default_rng(0).permutation(len(source))[:count]))


def run(protocol: Protocol, backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    members = fitted(protocol, backbone, args.work)
    found = evaluate(
        members | fusions(members),
        id=some(protocol.test, args.images),
        ood={name: some(source, args.images) for name, source in protocol.ood.items()},
        calibrate=some(protocol.calibration, args.images),
        bootstrap=args.bootstrap,
        set_kinds=protocol.kinds,
        notes=protocol.notes,
        out=args.work / protocol.name / "results",
        cache=args.work / "features",
        progress=False,
    ).results
    return {"detectors": {name: shown(of) for name, of in found["detectors"].items()}, "data": found["data"]}


def shown(figures: dict[str, Any]) -> dict[str, Any]:
    """What the table is made of; everything else is in --work."""
    members = figures.get("against_members", {"detectors": {}})["detectors"]
    differences = {name: of["average"] for name, of in members.items()}
    return {"average": figures["average"], "per_set": figures["per_set"], "members_minus_this": differences}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True, help="folder with the parquet packs")
    parser.add_argument("--work", type=Path, required=True, help="folder of detectors and features")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--images", type=int, default=1000, help="of each test set, at most")
    parser.add_argument("--bootstrap", type=int, default=500)
    parser.add_argument("--protocols", nargs="+", default=["ham-4", "tiny-imagenet-100"])
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype="float32")
    args.work = args.work.expanduser() / backbone.fingerprint[:12]
    results = {name: run(find_protocol(name, args.packs), backbone, args) for name in args.protocols}
    about = environment() | {"backbone": {"spec": args.backbone, "fingerprint": backbone.fingerprint}}
    publish(RESULT, {"protocols": results, "papers": PAPERS, "images": args.images, "environment": about})
    for protocol, found in results.items():
        for name, figures in sorted(found["detectors"].items(), key=lambda item: -item[1]["average"]["auroc"]):
            print(f"{protocol} {name}: {figures['average']['auroc']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
