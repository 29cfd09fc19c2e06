"""Look at what the embedded backbone sees: random held-out photographs, their best classes and a map of patches.

    uv run python tools/look_tiny.py --packs ../shared/data --out look.png

Each picture stands beside the map of its top class: the cosine of every patch with that class's text, from its lowest
(dark) to its highest (light). The names below are the three best of 200 with their softmax at the model's scale;
the true class is in brackets. The pictures belong to the packs: nothing of them is kept in the repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from ood_core import ParquetImages, create_backbone
from ood_core.prompts import text_features
from PIL import Image, ImageDraw

SIDE, COLUMNS = 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = ParquetImages(args.packs / "tiny-imagenet.parquet", split="val")
    chosen = np.random.default_rng(args.seed).choice(len(source), args.count, replace=False)
    backbone = create_backbone("tiny", dtype="float32")
    images = [source.open(int(index)) for index in chosen]
    image, local = backbone.encode_dense(torch.stack([backbone.transform(one) for one in images]))
    text = text_features(backbone, source.label_names, "a photo of a {}")
    best = (backbone.logit_scale * image @ text.T).softmax(-1).topk(3)
    rows = -(-args.count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (2 * SIDE + 16), rows * (SIDE + 64)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, index in enumerate(chosen):
        left, top = number % COLUMNS * (2 * SIDE + 16), number // COLUMNS * (SIDE + 64)
        sheet.paste(images[number].resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
        cosines = (local[number] @ text[best.indices[number, 0]]).view(8, 8)
        low, high = cosines.min(), cosines.max()
        grey = ((cosines - low) / (high - low) * 255).byte().numpy()
        sheet.paste(Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left + SIDE + 4, top))
        lines = [
            f"{source.label_names[c]} {p:.2f}"
            for p, c in zip(best.values[number].tolist(), best.indices[number].tolist(), strict=True)
        ]
        lines.append(f"[{source.label_names[source.labels[index]]}]  cosines {low:.2f} to {high:.2f}")
        draw.text((left, top + SIDE + 2), "\n".join(lines), fill="black")
    sheet.save(args.out)


if __name__ == "__main__":
    main()
