"""The same jobs done by other libraries: k nearest neighbours, scores and metrics, with what they agree on.

    uv run --group benchmarks python benchmarks/peers.py

pytorch-ood, scikit-learn and faiss on the same random features, in turn in one process; figures are medians. Memory
is what a job adds to the process at its peak, each in a process of its own. "difference" is the largest between a
peer's result and ours. Writes benchmarks/results/peers.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from harness import added_at_peak, in_own_process, medians, publish
from ood_core import functional
from ood_core.evaluation import environment
from ood_core.metrics import evaluate_scores
from pytorch_ood.detector import GEN, KNN, EnergyBased
from pytorch_ood.metrics import OODMetrics
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "peers.json"
K = 50
Jobs = dict[str, Callable[[], Any]]


def nearest_neighbours(queries: int, bank: int, width: int) -> Jobs:
    """Distances to the 50th neighbour; every library has its index built before."""
    generator = torch.Generator().manual_seed(0)
    q, b = (F.normalize(torch.randn(n, width, generator=generator), dim=1) for n in (queries, bank))
    index = faiss.IndexFlatIP(width)
    index.add(b.numpy())
    peer = KNN(None, k=K, algorithm="brute").fit_features(b, torch.zeros(bank, dtype=torch.int64))

    def by_faiss() -> Tensor:
        cosine = torch.from_numpy(index.search(q.numpy(), K)[0][:, -1])
        return (2 - 2 * cosine).clamp(min=0).sqrt()

    return {
        "ours": lambda: -functional.knn(q, b, k=K),
        "faiss flat": by_faiss,
        "pytorch-ood (scikit-learn)": lambda: peer.predict_features(q),
        "torch matmul and topk": lambda: (2 - 2 * (q @ b.T).topk(K).values[:, -1]).clamp(min=0).sqrt(),
    }


def logit_scores(images: int, classes: int) -> tuple[Jobs, Jobs]:
    """Energy and GEN of the same logits."""
    logits = 3 * torch.randn(images, classes, generator=torch.Generator().manual_seed(0))
    energy = {"ours": lambda: functional.energy(logits), "pytorch-ood": lambda: -EnergyBased.score(logits)}
    gen = {
        "ours": lambda: functional.gen(logits, gamma=0.1, top=100),
        "pytorch-ood": lambda: -100 * GEN.score(logits, gamma=0.1, M=100),  # a mean there, a sum here
    }
    return energy, gen


def metrics(images: int) -> Jobs:
    """AUROC, FPR95 and both AUPRs of as many ID as OOD scores; AUPR has two definitions and is not compared."""
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, images // 2), rng.normal(0, 1, images // 2)
    both = np.concatenate([inside, outside])
    known = np.concatenate([np.ones(images // 2), np.zeros(images // 2)])
    # There the FPR is at 95 % of the OOD images; with the roles exchanged it is at 95 % of the ID images, as ours.
    outlier, labels = torch.from_numpy(both), torch.from_numpy(np.where(known == 1, -1, 0))

    def ours() -> Tensor:
        found = evaluate_scores(inside, {"ood": outside}).per_set["ood"]
        return torch.tensor([found.auroc, found.fpr95])

    def by_scikit_learn() -> Tensor:
        false, true, _ = roc_curve(known, both, drop_intermediate=False)
        average_precision_score(known, both), average_precision_score(1 - known, -both)
        return torch.tensor([roc_auc_score(known, both), false[true >= 0.95].min()])

    def by_pytorch_ood() -> Tensor:
        found = OODMetrics().update(outlier, labels).compute()
        return torch.tensor([found["AUROC"], found["FPR95TPR"]])

    return {"ours": ours, "scikit-learn": by_scikit_learn, "pytorch-ood": by_pytorch_ood}


def tasks() -> dict[str, Callable[[], Jobs]]:
    return {
        "50 nearest of 100,000 x 768, 512 queries": lambda: nearest_neighbours(512, 100_000, 768),
        "energy, 50,000 x 1,000 logits": lambda: logit_scores(50_000, 1000)[0],
        "GEN (100 of 1,000 classes), 50,000 images": lambda: logit_scores(50_000, 1000)[1],
        "AUROC, FPR95, AUPR-in, AUPR-out, 1,000,000 scores": lambda: metrics(1_000_000),
    }


def measure(task: str, job: str) -> float:
    """MiB that a job adds to this process."""
    work = tasks()[task]()[job]
    return added_at_peak(work)[1]


def peak(task: str, job: str) -> float:
    return in_own_process("peers", f"measure({task!r}, {job!r})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for task, make in tasks().items():
        jobs = make()
        seconds = medians(jobs, args.rounds)
        ours = jobs["ours"]().double()
        results[task] = {
            name: {
                "seconds": seconds[name],
                "times_ours": seconds[name] / seconds["ours"],
                "mebibytes": peak(task, name),
                "difference": (job().double() - ours).abs().max().item(),
            }
            for name, job in jobs.items()
        }
        for name, row in results[task].items():
            print(f"{task} | {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    publish(RESULT, {"results": results, "environment": environment(), "peers": peers()})
    return 0


def peers() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("pytorch-ood", "faiss-cpu", "scikit-learn")}


if __name__ == "__main__":
    sys.exit(main())
