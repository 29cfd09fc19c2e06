"""Extraction throughput as a share of the bare model forward, cold and cached, and bfloat16 against float32.

    uv run python benchmarks/extraction.py

The three jobs run in turn, several times in one process, and the medians of the ratios of one round count. Writes
benchmarks/results/extraction.json.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import publish
from ood_core import create_backbone, extract
from ood_core.data import ImageFolder, scenes
from ood_core.evaluation import environment

RESULT = Path(__file__).parent / "results" / "extraction.json"


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(spec: str, size: int, images: int, batch: int, rounds: int, workers: int, folder: Path) -> dict:
    """Images per second of the bare forward, of extraction from JPEG-like files and from the cache, per dtype."""
    source = ImageFolder(folder).subset(range(images))
    found = {}
    backbones = {dtype: create_backbone(spec, dtype=dtype) for dtype in ("float32", "bfloat16")}
    pixels = torch.stack([backbones["float32"].transform(source.open(i)) for i in range(batch)])
    times: dict[str, list[float]] = {f"{dtype} {job}": [] for dtype in backbones for job in ("bare", "cold", "cached")}
    for _ in range(rounds + 1):  # the first round warms up and does not count
        for dtype, backbone in backbones.items():
            with tempfile.TemporaryDirectory() as cache:
                batches = images // batch
                times[f"{dtype} bare"].append(
                    seconds(lambda b=backbone, n=batches: [b.encode_dense(pixels) for _ in range(n)])
                )
                for job in ("cold", "cached"):
                    options = {"batch_size": batch, "workers": workers, "cache": cache}
                    times[f"{dtype} {job}"].append(seconds(lambda b=backbone, o=options: extract(b, source, **o)))
    times = {name: values[1:] for name, values in times.items()}
    for name, values in times.items():
        found[f"{name} images/s"] = images / statistics.median(values)
    for dtype in backbones:
        for job in ("cold", "cached"):
            found[f"{dtype} {job} / bare"] = _ratio(times[f"{dtype} bare"], times[f"{dtype} {job}"])
    found["bfloat16 bare / float32 bare"] = _ratio(times["float32 bare"], times["bfloat16 bare"])
    return {key: round(value, 3) for key, value in found.items()}


def _ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {"tiny": ("tiny", 64, 512, 64), "ViT-B-16": ("open_clip:ViT-B-16", 256, 16, 8)}
        for name, (spec, size, images, batch) in jobs.items():
            made = scenes.write_folder(scenes.render(scenes.ID_CLASSES, images // 8, size=size), Path(folder) / name)
            rounds = args.rounds if name == "tiny" else 3
            for workers in (0, 1):
                results[f"{name}, workers={workers}"] = measure(spec, size, images, batch, rounds, workers, made)
                print(name, workers, results[f"{name}, workers={workers}"], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    publish(args.out, {"results": results, "peak_mebibytes": round(peak), "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
