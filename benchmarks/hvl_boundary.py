"""Do HVL's pseudo-OOD tiles lie on the boundary of a lesion? Generated lesions with masks have the answer.

    uv run python benchmarks/hvl_boundary.py

A fine tile lies on the boundary when between 5 and 95 % of its pixels are lesion, inside above, outside below. Shares
are means over test images: of the K tiles with the largest entropy gain, of background selection (the true class is
not among the likeliest), and of all tiles, which is chance. Writes benchmarks/results/hvl_boundary.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import publish
from ood_core import create_backbone, create_detector, extract
from ood_core.data import scenes
from ood_core.evaluation import environment
from ood_hvl.model import background
from PIL import Image
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "hvl_boundary.json"
TRAIN, TEST = 0, 2  # seeds of the images
KNOWN = ("melanocytic nevus", "melanoma", "dermatofibroma", "vascular lesion")


def places(masks: Tensor, n: int) -> dict[str, Tensor]:
    """bool [N, 4 n^2] of fine tiles: "boundary", "inside" and "outside"."""
    share = F.adaptive_avg_pool2d(masks[:, None].float(), 2 * n).flatten(1)
    inside, outside = share > 0.95, share < 0.05
    return {"boundary": ~(inside | outside), "inside": inside, "outside": outside}


def shares(chosen: Tensor, where: dict[str, Tensor]) -> dict[str, float]:
    """Mean over images of the shares of the chosen tiles [N, 4 n^2]; images without any do not count."""
    some = chosen.any(1)
    count = chosen[some].sum(1).double()
    return {name: float(((chosen & at)[some].sum(1) / count).mean()) for name, at in where.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--per-class", type=int, default=40, help="training images")
    parser.add_argument("--n", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype=args.dtype)
    size = max(backbone.transform.crop)
    known = [name for name in scenes.LESIONS if name in KNOWN]
    test = scenes.render_lesions(known, 25, size=size, seed=TEST)
    where = places(torch.from_numpy(test.masks), args.n)
    labels = torch.from_numpy(test.labels)
    results: dict[str, list[dict[str, float]]] = {"all tiles (chance)": [shares(where["inside"] | True, where)]}
    with tempfile.TemporaryDirectory() as folder:
        scenes.write_folder(scenes.render_lesions(known, args.per_class, size=size, seed=TRAIN), folder)
        for seed in args.seeds:
            detector = create_detector("hvl", backbone=backbone, class_names=known, seed=seed, n=args.n)
            detector.fit(folder, progress=False)
            images = [Image.fromarray(image) for image in test.images]
            features = extract(detector.backbone, images, detector.needs, progress=False)
            with torch.no_grad():
                scales = detector.scales(features)
                index = detector.trained_model(features).select(scales)
            gain = torch.zeros_like(where["inside"]).scatter(1, index, True)
            results.setdefault("entropy gain", []).append(shares(gain, where))
            results.setdefault("background", []).append(shares(background(scales.log_p[2], labels), where))
            kept = {"kept tiles": scales.keep2, "dropped tiles": ~scales.keep2}
            for name, chosen in kept.items():
                results.setdefault(name, []).append(shares(chosen, where))
    figures = {
        name: {place: sum(row[place] for row in rows) / len(rows) for place in where} for name, rows in results.items()
    }
    settings = {"test_images": len(labels), "per_class": args.per_class, "n": args.n, "seeds": args.seeds}
    publish(args.out, {"results": figures, "settings": settings, "environment": environment([detector])})
    for name, row in figures.items():
        print(f"{name:20s}" + "".join(f"  {place} {100 * share:5.1f} %" for place, share in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
