"""One training step of MoFE with Dynamic-beta Mixup: ours against gradients through the whole network.

    uv run python benchmarks/mofe_training_step.py

At the shapes of ViT-B/16 (random weights: times do not depend on them), forward and backward of all losses on as many
mixed as clean images. Ours runs the frozen trunk without a graph and the experts on the class token alone. "all
tokens" runs the experts on all tokens, behind the frozen trunk. "full autograd" keeps the graph of every block and
computes the gradients of all weights, as fine-tuning a network usually does. The losses of the three are compared.
Jobs take turns in one process; memory is what a step adds at its peak, in a process of its own. Writes
benchmarks/results/mofe_training_step.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import added_at_peak, in_own_process, medians, publish
from ood_core import create_backbone
from ood_core.evaluation import environment
from ood_mofe.model import MoFENetwork
from ood_mofe.training import Objective
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "mofe_training_step.json"
SPEC, CLASSES, EXPERTS = "open_clip:ViT-B-16", 100, 7
NAMES = ("ours", "all tokens", "full autograd")


def step(name: str, batch: int) -> Callable[[], float]:
    """Computes the gradients of a batch and returns the loss."""
    torch.manual_seed(0)  # of the random weights
    backbone = create_backbone(SPEC, dtype="float32")
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    group = torch.arange(CLASSES) % EXPERTS
    network = MoFENetwork.from_backbone(backbone, group, experts=EXPERTS, tokens="cls" if name == "ours" else "all")
    trained = [*network.parameters()]
    if name == "full autograd":
        trained += backbone.model.visual.requires_grad_(True).parameters()

    def encode(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(name == "full autograd"):
            return backbone.prefix(x)

    labels = torch.arange(batch) * 13 % CLASSES
    accuracy = torch.full((CLASSES,), 0.5, dtype=torch.float64)
    objective = Objective(network, labels, lambda rows, _: pixels[rows], encode, accuracy=lambda _: accuracy)
    rows = torch.arange(batch)

    def run() -> float:
        for parameter in trained:
            parameter.grad = None
        terms = objective(rows, 0, batch=rows).values()
        loss = torch.stack([t[0] / t[1] if isinstance(t, tuple) else t for t in terms]).sum()
        loss.backward()
        return loss.item()

    return run


def measure(name: str, batch: int) -> float:
    """MiB that a step adds to this process."""
    return added_at_peak(step(name, batch))[1]


def peak(name: str, batch: int) -> float:
    return in_own_process("mofe_training_step", f"measure({name!r}, {batch})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="clean images, and as many mixed ones")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    jobs = {name: step(name, args.batch) for name in NAMES}
    seconds = medians(jobs, args.rounds)
    results = {
        name: {
            "seconds": seconds[name],
            "times_ours": seconds[name] / seconds["ours"],
            "mebibytes": peak(name, args.batch),
            "loss": job(),
        }
        for name, job in jobs.items()
    }
    for name, row in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in row.items()))
    settings = {"backbone": SPEC, "batch": args.batch, "classes": CLASSES, "experts": EXPERTS}
    publish(RESULT, {"results": results, "settings": settings, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
