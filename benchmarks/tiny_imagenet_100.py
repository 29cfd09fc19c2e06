"""All detectors on the protocol `tiny-imagenet-100`: real photographs, near and far OOD sets, 95 % intervals.

    uv run python benchmarks/tiny_imagenet_100.py --packs ../shared/data

The sets are those of the protocol (`ood list protocols`). Writes benchmarks/results/tiny_imagenet_100.json, which
`tools/make_docs.py` turns into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import publish
from ood_core import (
    ParquetImages,
    create_backbone,
    create_detector,
    evaluate,
    extract,
    list_detectors,
)
from ood_core.backbones.base import Backbone
from ood_core.data.sources import ImageSource
from ood_core.prompts import text_features
from ood_core.protocols import find_protocol

RESULT = Path(__file__).parent / "results" / "tiny_imagenet_100.json"
OTHERS = ("iim", "setar", "neg_label", "hvl", "mofe")  # in iim.py, setar.py, hvl.py, mofe.py
ZERO_SHOT = ["mcm", "gl_mcm", "r_mcm", "s_mcm"]


def fit_images(packs: Path) -> ImageSource:
    """All 50 images per ID class that the backbone has not seen: the protocol draws its few shots from them."""
    return split_classes(ParquetImages(packs / "tiny-imagenet.parquet", split="fit"))[0]


def test_sets(packs: Path) -> dict[str, ImageSource]:
    """The ID test set as "id", and the OOD sets."""
    protocol = find_protocol("tiny-imagenet-100", packs)
    return {"id": protocol.test, **protocol.ood}


def with_far_mean(detectors: dict[str, Any]) -> dict[str, Any]:
    """Figures by detector, with "far_mean": the mean over all OOD sets but the near one."""
    for figures in detectors.values():
        far = [figure for name, figure in figures["per_set"].items() if name != "near"]
        figures["far_mean"] = {key: statistics.fmean(figure[key] for figure in far) for key in ("auroc", "fpr95")}
    return detectors


def split_classes(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """Images of the first 100 wnids in sorted order, and of the other 100, each labelled among its own classes."""
    by_wnid = [source.label_names[i] for i in sorted(range(200), key=source.label_values.__getitem__)]
    halves = (source.with_labels_from(names) for names in (by_wnid[:100], by_wnid[100:]))
    first, second = (half.subset(half.labels >= 0) for half in halves)
    return first, second


def run(
    backbone: Backbone,
    packs: Path,
    detectors: Sequence[str],
    *,
    bootstrap: int,
    seed: int = 0,
    report: Path | None = None,
    cache: str | None = None,
) -> dict[str, Any]:
    """The protocol's results, as `ood evaluate` writes them, and for every detector the mean over the far sets."""
    protocol = find_protocol("tiny-imagenet-100", packs, seed=seed)
    results = evaluate(
        {name: create_detector(name, backbone=backbone, class_names=protocol.class_names) for name in detectors},
        id=protocol.test,
        ood=protocol.ood,
        fit=protocol.train,
        calibrate=protocol.calibration,
        bootstrap=bootstrap,
        out=report,
        set_kinds=protocol.kinds,
        notes=protocol.notes,
        cache=cache,
    ).results
    with_far_mean(results["detectors"])
    return results | {"protocol": "tiny-imagenet-100"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True, help="folder with the parquet packs")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache", help="feature cache")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the few-shot split")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--report", type=Path, help="folder for the full results and the HTML report")
    args = parser.parse_args()
    if not (args.packs / "tiny-imagenet.parquet").exists():
        print(f"{args.packs} holds no tiny-imagenet.parquet: give --packs the folder with the packs.", file=sys.stderr)
        return 3
    backbone = create_backbone(args.backbone, dtype=args.dtype)
    results = run(
        backbone,
        args.packs,
        [name for name in list_detectors() if name not in OTHERS],
        bootstrap=args.bootstrap,
        seed=args.seed,
        report=args.report,
        cache=args.cache,
    )
    val = ParquetImages(args.packs / "tiny-imagenet.parquet", split="val")
    results["zero_shot_top1"] = zero_shot_accuracy(backbone, val, args.cache)
    publish(args.out, results)
    for name, figures in sorted(results["detectors"].items(), key=lambda item: -item[1]["average"]["auroc"]):
        near_auroc, far_auroc = figures["per_set"]["near"]["auroc"], figures["far_mean"]["auroc"]
        print(f"{name:12s} near {near_auroc:.3f}  far {far_auroc:.3f}  average {figures['average']['auroc']:.3f}")
    print(f"zero-shot top-1 over 200 classes: {results['zero_shot_top1']:.4f}")
    return 0


def zero_shot_accuracy(backbone, val: ImageSource, cache: str | None) -> float:
    """Top-1 over all classes of `val`, names verbatim."""
    features = extract(backbone, val, needs={"image"}, cache=cache)
    text = text_features(backbone, val.label_names, "a photo of a {}")
    return float((features.image @ text.T).argmax(-1).eq(features.labels).float().mean())


if __name__ == "__main__":
    sys.exit(main())
