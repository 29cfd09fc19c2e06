"""Do the patches that IIM mines lie where they should? Generated scenes with object masks have the answer.

    uv run python benchmarks/iim_localisation.py

The k patches most like the label's class should lie on the object (positives), the next k beside it (OOD patches).
Both shares are means over 200 test scenes, before the training (class texts of the template) and after it, beside what
patches drawn by chance and the best possible choice of k would reach. A patch lies on the object when at least half of
its pixels do. Writes benchmarks/results/iim_localisation.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import publish
from ood_core import create_backbone, create_detector, extract
from ood_core.backbones.base import Backbone
from ood_core.data import scenes
from ood_core.detectors.zero_shot import default_k
from ood_core.evaluation import environment
from PIL import Image
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "iim_localisation.json"
TRAIN, TEST = 0, 2  # seeds of the scenes


def patches_on_object(backbone: Backbone, made: scenes.SceneSet) -> Tensor:
    """bool [N, P]; the masks go through the transform of the images, so that crops are the same."""
    black, white = (backbone.transform(Image.new("RGB", (8, 8), color))[:1, :1, :1] for color in ("black", "white"))
    masks = torch.stack([backbone.transform(Image.fromarray(mask).convert("RGB"))[:1] for mask in made.masks])
    inside = (masks > (black + white) / 2).float()
    return F.adaptive_avg_pool2d(inside, backbone.grid).flatten(1) >= 0.5


def shares(similarity: Tensor, on_object: Tensor, k: int) -> dict[str, float]:
    """Mean over scenes of the shares of patches that lie where they should, with standard errors.

    `similarity` [N, P] of the patches to the label's class, `on_object` bool [N, P].
    """
    hits = on_object.gather(1, similarity.topk(2 * k, dim=1).indices).double()
    found = {"positive_on_object": hits[:, :k].mean(1), "ood_beside_object": 1 - hits[:, k:].mean(1)}
    figures = {name: float(values.mean()) for name, values in found.items()}
    return figures | {f"{name}_se": float(v.std() / math.sqrt(len(v))) for name, v in found.items()}


def bounds(on_object: Tensor, k: int) -> dict[str, dict[str, float]]:
    """The same shares by chance, and at best: some objects have fewer than k patches."""
    count, patches = on_object.sum(1).double(), on_object.shape[1]
    return {
        "chance": {
            "positive_on_object": float(count.mean() / patches),
            "ood_beside_object": float(1 - count.mean() / patches),
        },
        "best possible": {
            "positive_on_object": float((count / k).clamp(max=1).mean()),
            "ood_beside_object": float(((patches - count) / k).clamp(max=1).mean()),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shots", type=int, default=16, help="training scenes per class")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--negatives", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1, help="of the training")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype=args.dtype)
    size = max(backbone.transform.crop)
    options = {"epochs": args.epochs, "negative_prompts": args.negatives, "learning_rate": args.learning_rate}
    detector = create_detector("iim", backbone=backbone, class_names=scenes.ID_CLASSES, seed=args.seed, **options)
    with tempfile.TemporaryDirectory() as folder:
        train = scenes.render(scenes.ID_CLASSES, args.shots, size=size, seed=TRAIN)
        detector.fit(scenes.write_folder(train, folder))
    test = scenes.render(scenes.ID_CLASSES, 25, size=size, seed=TEST)
    local = extract(backbone, [Image.fromarray(image) for image in test.images], {"local"}).local
    on_object = patches_on_object(backbone, test)
    k = default_k(None, on_object.shape[1])
    figures = bounds(on_object, k)
    for name, key in (("before training", "text"), ("after training", "local_text")):
        of_label = detector.state[key][torch.from_numpy(test.labels)]
        figures[name] = shares((local @ of_label[..., None]).squeeze(2), on_object, k)
    recipe = {"scenes": len(test), "shots": args.shots, "k": k, "seed": args.seed, **options}
    publish(args.out, {"results": figures, "settings": recipe, "environment": environment([detector])})
    print(f"{'':16s} {'positive on object':>19s} {'OOD beside object':>18s}")
    for name, row in figures.items():
        print(f"{name:16s} {100 * row['positive_on_object']:17.1f} % {100 * row['ood_beside_object']:16.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
