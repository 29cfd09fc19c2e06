"""One training step of IIM on the text tower of ViT-B/16: ours against the usual way, time and peak memory.

    uv run python benchmarks/iim_training_step.py

The usual way encodes all prompts at 77 tokens in one batch and keeps every activation. Ours cuts each prompt behind
its end mark (exact under the causal mask), runs prompts of like length together and, above `max_prompt_batch`, computes
activations again. Each job runs in a process of its own; random weights, real shapes. With --classes 1000
--negatives 300 the usual way does not fit into ordinary memory: leave it out with --skip usual; the document then
extrapolates it from the small case by the number of prompts, and says so. Writes
benchmarks/results/iim_training_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import added_at_peak, publish
from ood_core import create_backbone
from ood_core.evaluation import environment
from ood_core.prompts import imagenet_names
from ood_iim.learner import PromptLearner

RESULT = Path(__file__).parent / "results" / "iim_training_step.json"
BATCH, PATCHES, K = 32, 196, 50
JOBS = {"usual": None, "ours": None, "ours, recomputed": 64}


class Padded(PromptLearner):
    """All prompts at the full context length, in one pass."""

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        backbone, classes = self.backbone, len(self.names)
        names = (*self.names, *[""] * len(self.negative_context))
        words, end = backbone.prompt_words(names)
        context = torch.cat([self.context, self.negative_context])
        prompts = torch.cat([words[:, :1], context.to(words.dtype), words[:, 1:]], 1)
        prompts = F.pad(prompts, (0, 0, 0, backbone.context_length - prompts.shape[1]))
        hidden = backbone.text_hidden(prompts, end + context.shape[1])
        features = F.normalize((hidden.to(self.text_projection.dtype) @ self.text_projection).float(), dim=-1)
        return features[:classes], features[classes:]


def measure(name: str, classes: int, negatives: int, steps: int) -> dict[str, float]:
    """Median seconds of a step and MiB above the loaded model at the peak, in this process."""
    backbone = create_backbone("open_clip:ViT-B-16")
    kind = Padded if name == "usual" else PromptLearner
    with torch.no_grad():
        learner = kind(
            backbone, imagenet_names()[:classes], negatives=min(negatives, 1), max_prompt_batch=JOBS[name]
        )  # a small start, so that the constructor's own pass does not set the peak
    generator = torch.Generator().manual_seed(0)
    learner.negative_context = torch.nn.Parameter(0.02 * torch.randn(negatives, 16, 512, generator=generator))
    local = F.normalize(torch.randn(BATCH, PATCHES, 512, generator=generator), dim=-1)
    labels = torch.randint(classes, (BATCH,), generator=generator)
    optimizer = torch.optim.SGD(learner.parameters(), lr=2.5e-4, momentum=0.9)

    def step() -> float:
        started = time.perf_counter()
        terms = learner.losses(local, labels, k=K)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        return time.perf_counter() - started

    seconds, peak = added_at_peak(lambda: [step() for _ in range(steps)])
    return {"seconds": statistics.median(seconds), "mebibytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--negatives", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[])
    args = parser.parse_args()
    shape = f"{args.classes} + {args.negatives}"
    found = {}
    for name in JOBS:
        if name in args.skip:
            continue
        code = (
            "import json; from iim_training_step import measure; "
            f"print(json.dumps(measure({name!r}, {args.classes}, {args.negatives}, {args.steps})))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        found[name] = json.loads(done.stdout)
        print(
            f"{shape}: {name:18s} {found[name]['seconds']:7.2f} s/step  {found[name]['mebibytes']:9.0f} MiB", flush=True
        )
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"shapes": {}}
    results["shapes"][shape] = found
    results["environment"] = environment()
    publish(RESULT, results)


if __name__ == "__main__":
    main()
