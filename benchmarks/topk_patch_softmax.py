"""S-MCM's patch matching on cached features: ours against a bare matmul, the plain way and the released code's way.

    uv run python benchmarks/topk_patch_softmax.py

Shapes of CLIP ViT-B/16 on ImageNet-1k: P = 196, d = 512, C = 1,000, M = 300, k = 50. Jobs alternate in one run;
figures are medians. "Plain" computes both softmaxes over [B, P, C + M] and takes the k largest; "released" computes
six such softmaxes, as the published code does for its six scores. Memory is what a job adds to the process at its
peak, each in a process of its own. Writes benchmarks/results/topk_patch_softmax.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import added_at_peak, in_own_process, publish
from ood_core.evaluation import environment
from ood_core.ops import topk_patch_softmax
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "topk_patch_softmax.json"
PATCHES, WIDTH, CLASSES, NEGATIVES, K = 196, 512, 1000, 300, 50


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, PATCHES, WIDTH), (CLASSES, WIDTH), (NEGATIVES, WIDTH))
    return tuple(F.normalize(torch.randn(*s, generator=generator), dim=-1).to(device) for s in shapes)  # type: ignore


def bare(local: Tensor, text: Tensor, negatives: Tensor) -> None:
    columns = torch.cat([text, negatives]).T
    for image in local:
        image @ columns


def plain(local: Tensor, text: Tensor, negatives: Tensor) -> None:
    topk_patch_softmax(local, text, negatives, k=K, backend="reference")


def released(local: Tensor, text: Tensor, negatives: Tensor) -> None:
    """Six scores, each from its own softmax of the whole tensor and a selection among all its entries."""
    classes, others = local @ text.T, local @ negatives.T
    everything = torch.cat([classes, others], -1)
    for logits, dim in ((classes, -1), (classes, -1), (everything, -1), (classes, -2), (everything, -1), (classes, -2)):
        logits.softmax(dim)[..., :CLASSES].flatten(1).topk(K).values.mean(-1)


def ours(local: Tensor, text: Tensor, negatives: Tensor) -> None:
    topk_patch_softmax(local, text, negatives, k=K)


JOBS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "bare matmul": bare,
    "ours": ours,
    "plain": plain,
    "released": released,
}


def timed(job: Callable[..., None], tensors: tuple[Tensor, ...], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    job(*tensors)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(name: str, batch: int, device: str) -> float:
    """MiB that a job adds at its peak, measured in a process of its own."""
    return in_own_process("topk_patch_softmax", f"measure({name!r}, {batch}, {device!r})")


def measure(name: str, batch: int, device: str) -> float:
    """MiB that a job adds to this process."""
    warm = inputs(1, device)
    for job in JOBS.values():
        job(*warm)
    tensors = inputs(batch, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        JOBS[name](*tensors)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return added_at_peak(lambda: JOBS[name](*tensors))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tensors = inputs(args.batch, args.device)
    times: dict[str, list[float]] = {name: [] for name in JOBS}
    with torch.no_grad():
        for turn in range(args.rounds + 1):
            for name, job in JOBS.items():
                seconds = timed(job, tensors, args.device)
                if turn:  # the first round warms up
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: peak(name, args.batch, args.device) for name in JOBS}
    results = {
        "batch": args.batch,
        "shape": {"P": PATCHES, "d": WIDTH, "C": CLASSES, "M": NEGATIVES, "k": K},
        "milliseconds_per_image": {name: 1000 * value / args.batch for name, value in medians.items()},
        "times_bare_matmul": {name: value / medians["bare matmul"] for name, value in medians.items()},
        "peak_mebibytes": memory,
        "environment": environment(),
    }
    publish(RESULT, results)
    for name in JOBS:
        print(
            f"{name:12s} {results['milliseconds_per_image'][name]:7.3f} ms/image  "
            f"{results['times_bare_matmul'][name]:5.2f} x bare  {memory[name]:8.1f} MiB"
        )


if __name__ == "__main__":
    main()
