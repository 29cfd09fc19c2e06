"""What HVL costs: a training step on cached embeddings against encoding again, the cache, and three scales against one.

    uv run python benchmarks/hvl_cost.py

At the shapes of ViT-B/16 (random weights: times do not depend on them), medians in one process. The step that encodes
again is measured on a few images and multiplied up to the batch. Writes benchmarks/results/hvl_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import added_at_peak, publish
from ood_core import create_backbone
from ood_core.evaluation import environment
from ood_hvl.model import HVLModel
from ood_hvl.pyramid import tiles_per_image, with_pyramid

RESULT = Path(__file__).parent / "results" / "hvl_cost.json"


def seconds(job: Callable[[], object], repeats: int) -> float:
    """Median time of a job, once warm."""
    job()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        job()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="open_clip:ViT-B-16")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=40)
    parser.add_argument("--encoded", type=int, default=1, help="images that are really encoded again")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    n = 2
    backbone = create_backbone(args.backbone, dtype=args.dtype)
    wide = with_pyramid(backbone, n)
    pixels = torch.randn(args.encoded, 3, *backbone.transform.crop)
    cached = torch.randn(args.batch, tiles_per_image(n), backbone.width).half()
    labels = torch.arange(args.batch) % args.classes
    model = HVLModel(torch.randn(args.classes, backbone.width))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(model.losses(cached.float(), labels).values())).sum().backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad():
            model(cached.float()).combined("paper")

    # The single scale first, and nothing large before it: what was once allocated is used again.
    one, peak_one = added_at_peak(lambda: seconds(lambda: backbone.encode_image(pixels), args.repeats))
    three, peak_three = added_at_peak(lambda: seconds(lambda: wide.encode(pixels, {"pyramid"}), args.repeats))
    trained, head = seconds(step, 10 * args.repeats), seconds(infer, 10 * args.repeats)
    again = three / args.encoded * args.batch + trained
    results = {
        "cached_step_ms": 1000 * trained,
        "step_that_encodes_ms": 1000 * again,
        "ratio": again / trained,
        "cache_bytes_per_image": cached[0].numel() * cached.element_size(),
        "encoded_images_per_second": args.encoded / three,
        "encoded_tiles_per_second": args.encoded * tiles_per_image(n) / three,
        "single_scale_images_per_second": args.encoded / one,
        "time_against_single_scale": three / one,
        "head_ms_per_image": 1000 * head / args.batch,
        "added_mib_three_scales": peak_three,
        "added_mib_single_scale": peak_one,
    }
    settings = {"backbone": backbone.spec, "dtype": args.dtype, "batch": args.batch, "classes": args.classes, "n": n}
    publish(args.out, {"results": results, "settings": settings, "environment": environment()})
    for name, value in results.items():
        print(f"{name:32s} {value:12,.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
