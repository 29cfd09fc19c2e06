"""Measure whether a backbone of the embedded kind has local patches: print the figures as JSON.

    uv run python tools/measure_tiny.py --packs ../shared/data
    uv run python tools/measure_tiny.py --packs ../shared/data --weights FOLDER --split fit --without-ood

Recipes are compared on the split `fit` without OOD sets; `val` and the OOD sets are for the finished weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from ood_core import ParquetImages, create_backbone, extract
from ood_core.backbones.base import Backbone
from ood_core.data import scenes
from ood_core.prompts import text_features
from ood_core.tiny import load_model
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import tiny_imagenet_100 as protocol  # noqa: E402

TEMPLATE = "a photo of a {}"
RANKS = {"1-16": slice(16), "17-32": slice(16, 32), "33-64": slice(32, 64)}


def load_backbone(folder: Path | None) -> Backbone:
    """`tiny` in float32 with the weights in `folder`, or the shipped ones."""
    backbone = create_backbone("tiny", dtype="float32")
    backbone.model.load_state_dict(load_model(folder).state_dict())
    return backbone


def right_by_rank(local: Tensor, text: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of patches [N, P, d] whose best class is the image's, by the rank of their cosine to that class."""
    cosines = local @ text.T
    own = cosines.gather(2, labels[:, None, None].expand(-1, cosines.shape[1], 1))[..., 0]
    order = own.argsort(1, descending=True)
    right = cosines.argmax(-1).eq(labels[:, None]).float().gather(1, order)
    return {name: right[:, ranks].mean().item() for name, ranks in RANKS.items()}


def photographs(backbone: Backbone, packs: Path, split: str) -> dict[str, float]:
    """Top-1 among all 200 classes and among the protocol's 100, and there the patches by rank."""
    source = ParquetImages(packs / "tiny-imagenet.parquet", split=split)
    features = extract(backbone, source, needs={"image", "local"})
    known = protocol.split_classes(source)[0].label_names
    everything = text_features(backbone, source.label_names, TEMPLATE)
    half = torch.tensor([source.label_names.index(name) for name in known])
    rows = torch.isin(features.labels, half)
    image, text = features.image[rows], everything[half]
    labels = torch.searchsorted(half, features.labels[rows])
    return {
        "top1_of_200": (features.image @ everything.T).argmax(-1).eq(features.labels).float().mean().item(),
        "top1_of_100": (image @ text.T).argmax(-1).eq(labels).float().mean().item(),
        **right_by_rank(features.local[rows], text, labels),
    }


@torch.no_grad()
def objects(backbone: Backbone) -> dict[str, float]:
    """New scenes of the demo's known classes: share of patches showing the class, on the object and off it."""
    made = scenes.render(scenes.ID_CLASSES, 25, size=64, seed=5)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.transform.mean, backbone.transform.std))
    x = (torch.from_numpy(made.images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    image, local = backbone.encode_dense(x)
    text = text_features(backbone, scenes.ID_CLASSES, TEMPLATE)
    labels = torch.from_numpy(made.labels)
    covered = F.adaptive_avg_pool2d(torch.from_numpy(made.masks).float(), 8).flatten(1)
    right = (local @ text.T).argmax(-1).eq(labels[:, None]).float()
    return {
        "top1": (image @ text.T).argmax(-1).eq(labels).float().mean().item(),
        "on": right[covered > 0.75].mean().item(),
        "off": right[covered == 0].mean().item(),
    }


def zero_shot_auroc(backbone: Backbone, packs: Path) -> dict[str, dict[str, float]]:
    """AUROC of the zero-shot scores on `tiny-imagenet-100`, near and mean of the far sets."""
    results = protocol.run(backbone, packs, protocol.ZERO_SHOT, bootstrap=0)
    return {
        name: {"near": figures["per_set"]["near"]["auroc"], "far": figures["far_mean"]["auroc"]}
        for name, figures in results["detectors"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="folder with model.safetensors and config.json; default: shipped")
    parser.add_argument("--split", default="val", choices=["val", "fit"])
    parser.add_argument("--without-ood", action="store_true")
    args = parser.parse_args()
    backbone = load_backbone(args.weights)
    figures = {"photographs": photographs(backbone, args.packs, args.split), "scenes": objects(backbone)}
    if not args.without_ood:
        figures["auroc"] = zero_shot_auroc(backbone, args.packs)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
