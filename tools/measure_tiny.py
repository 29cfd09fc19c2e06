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
from typing import Any

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


def top1(image: Tensor, local: Tensor, text: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of images [N, d], of their patches [N, P, d] one by one, and of the mean of the patches."""

    def right(features: Tensor, labels: Tensor) -> float:
        return (features @ text.T).argmax(-1).eq(labels).float().mean().item()

    return {
        "image": right(image, labels),
        "single_patch": right(local, labels[:, None]),
        "mean_of_patches": right(local.mean(1), labels),
    }


def right_by_rank(local: Tensor, text: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of patches [N, P, d] whose best class is the image's, by the rank of their cosine to that class."""
    cosines = local @ text.T
    own = cosines.gather(2, labels[:, None, None].expand(-1, cosines.shape[1], 1))[..., 0]
    order = own.argsort(1, descending=True)
    right = cosines.argmax(-1).eq(labels[:, None]).float().gather(1, order)
    return {name: right[:, ranks].mean().item() for name, ranks in RANKS.items()}


@torch.no_grad()
def of_scenes(backbone: Backbone, photo_names: list[str]) -> dict[str, Any]:
    """New scenes of the demo's known classes: accuracy, and share of patches showing the class, on and off the object.

    Patches are judged among the known classes and among all photographs' and scenes' names: only there can a
    background look like something else.
    """
    made = scenes.render(scenes.ID_CLASSES, 50, size=64, seed=5)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.transform.mean, backbone.transform.std))
    x = (torch.from_numpy(made.images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    image, local = backbone.encode_dense(x)
    labels = torch.from_numpy(made.labels)
    covered = F.adaptive_avg_pool2d(torch.from_numpy(made.masks).float(), 8).flatten(1)
    others = [f"{material} {shape}" for material in scenes.MATERIALS for shape in scenes.SHAPES]
    names = [*scenes.ID_CLASSES, *photo_names, *(name for name in others if name not in scenes.ID_CLASSES)]
    text = text_features(backbone, names, TEMPLATE)
    figures: dict[str, Any] = {"top1": top1(image, local, text[: len(scenes.ID_CLASSES)], labels)}
    for count in (len(scenes.ID_CLASSES), len(names)):
        right = (local @ text[:count].T).argmax(-1).eq(labels[:, None]).float()
        figures[f"of {count}"] = {"on": right[covered > 0.75].mean().item(), "off": right[covered == 0].mean().item()}
    return figures


def zero_shot_auroc(backbone: Backbone, packs: Path) -> dict[str, dict[str, float]]:
    """AUROC of the zero-shot scores on `tiny-imagenet-100`, near and mean of the far sets."""
    results = protocol.run(backbone, packs, protocol.ZERO_SHOT, bootstrap=0)
    return {
        name: {"near": figures["per_set"]["near"]["auroc"], "far": figures["far_mean"]["auroc"]}
        for name, figures in results["detectors"].items()
    }


def measure(backbone: Backbone, packs: Path, split: str, *, ood: bool) -> dict[str, Any]:
    """All figures: accuracies, patches by rank (among the protocol's 100 classes), scenes, and with `ood` the AUROC."""
    source = ParquetImages(packs / "tiny-imagenet.parquet", split=split)
    features = extract(backbone, source, needs={"image", "local"})
    text = text_features(backbone, source.label_names, TEMPLATE)
    names = protocol.split_classes(source)[0].label_names
    known = torch.tensor([source.label_names.index(name) for name in names])
    rows, own = (features.labels[:, None] == known).nonzero(as_tuple=True)
    on_scenes = of_scenes(backbone, source.label_names)
    figures = {
        "top1": {
            "photographs": top1(features.image, features.local, text, features.labels),
            "photographs of 100 classes": top1(features.image[rows], features.local[rows], text[known], own),
            "scenes": on_scenes.pop("top1"),
        },
        "right_by_rank": right_by_rank(features.local[rows], text[known], own),
        "scenes": on_scenes,
    }
    return figures | ({"auroc": zero_shot_auroc(backbone, packs)} if ood else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="folder with model.safetensors and config.json; default: shipped")
    parser.add_argument("--split", default="val", choices=["val", "fit"])
    parser.add_argument("--without-ood", action="store_true")
    args = parser.parse_args()
    backbone = create_backbone("tiny", dtype="float32")
    backbone.model.load_state_dict(load_model(args.weights).state_dict())
    print(json.dumps(measure(backbone, args.packs, args.split, ood=not args.without_ood), indent=2))


if __name__ == "__main__":
    main()
