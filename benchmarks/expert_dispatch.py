"""Images through their experts: all tokens against the class token alone, and ours against the usual ways to dispatch.

    uv run python benchmarks/expert_dispatch.py

Shapes of ViT-B/14 at 224 pixels: T = 257, D = 768, H = 12, E = 7. First one expert, the full block against the folded
class token; then images routed to E experts: ours, a loop over experts with boolean masks, and
`torch.nn.functional.grouped_mm` on sorted images. Jobs alternate in one run; figures are medians. Before that, all are
compared with each other. --train measures forward and backward together. Memory is what a job adds to the process at
its peak, each in a process of its own. On a GPU "ours" are the kernels, the torch backend is timed beside them, and
the ceilings (a copy of the tokens, a large matmul) come from the same run. Writes
benchmarks/results/expert_dispatch.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import added_at_peak, in_own_process, publish
from ood_core.evaluation import environment
from ood_mofe import StackedExperts
from ood_mofe.ops import expert_class_token, expert_tokens
from ood_mofe.ops.expert_dispatch.torch import class_token
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "expert_dispatch.json"


@dataclass(frozen=True)
class Case:
    """What is measured; a batch of B images of T tokens of width D."""

    batch: int
    tokens: int
    width: int
    heads: int
    experts: int
    device: str
    dtype: str
    train: bool


Job = Callable[[Tensor, Tensor, StackedExperts], Tensor]


# ---- the jobs


def masked(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    out = torch.empty_like(tokens)
    for e in range(len(experts)):
        mine = expert == e
        out[mine] = experts.block(e, tokens[mine])
    return out


def masked_class_token(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    out = torch.empty_like(tokens[:, 0])
    for e in range(len(experts)):
        mine = expert == e
        if mine.any():
            out[mine] = class_token(tokens[mine], expert[mine], experts)
    return out


def grouped(tokens: Tensor, expert: Tensor, experts: StackedExperts) -> Tensor:
    """Images sorted by expert, the four linear maps by `grouped_mm`, and back."""
    p, order = experts, expert.argsort(stable=True)
    x, mine = tokens[order], expert[order]
    ends = (mine == torch.arange(len(p), device=mine.device)[:, None]).sum(1).cumsum(0) * tokens.shape[1]
    offsets = ends.int()

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = F.grouped_mm(x.flatten(0, 1).contiguous(), weight.mT, offs=offsets)
        return rows.view(*x.shape[:2], -1) + bias[mine][:, None]

    def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weight[mine][:, None] * F.layer_norm(x, x.shape[2:], eps=p.eps) + bias[mine][:, None]

    def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
        return x if scale is None else x * scale[mine][:, None]

    qkv = linear(normed(x, p.norm1_weight, p.norm1_bias), p.qkv_weight, p.qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, p.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + scaled(linear(mixed, p.out_weight, p.out_bias), p.scale1)
    up = p.activate(linear(normed(x, p.norm2_weight, p.norm2_bias), p.up_weight, p.up_bias))
    x = x + scaled(linear(up, p.down_weight, p.down_bias), p.scale2)
    return x[order.argsort()]


# Name -> (job, experts). One expert takes all images, else they are dealt out.
ONE: dict[str, Job] = {
    "one expert, full block": lambda tokens, expert, experts: experts.block(0, tokens),
    "one expert, class token": expert_class_token,
}
ROUTED: dict[str, Job] = {
    "all tokens, ours": expert_tokens,
    "all tokens, boolean masks": masked,
    "all tokens, grouped_mm": grouped,
    "class token, ours": expert_class_token,
    "class token, boolean masks": masked_class_token,
}
ON_GPU: dict[str, Job] = {
    "all tokens, torch": lambda *given: expert_tokens(*given, backend="torch"),
    "class token, torch": lambda *given: expert_class_token(*given, backend="torch"),
    "copy of the tokens": lambda tokens, expert, experts: tokens.clone(),
}


def jobs(case: Case) -> dict[str, Job]:
    return ONE | ROUTED | (ON_GPU if case.device != "cpu" else {})


# ---- inputs


@cache
def stacked(case: Case, count: int) -> StackedExperts:
    generator = torch.Generator().manual_seed(0)
    width, hidden = case.width, 4 * case.width

    def random(*shape: int, size: float = 0.02) -> Tensor:
        return size * torch.randn(count, *shape, generator=generator)

    experts = StackedExperts(
        norm1_weight=1 + random(width),
        norm1_bias=random(width),
        qkv_weight=random(3 * width, width, size=width**-0.5),
        qkv_bias=random(3 * width),
        out_weight=random(width, width, size=width**-0.5),
        out_bias=random(width),
        scale1=1 + random(width),
        norm2_weight=1 + random(width),
        norm2_bias=random(width),
        up_weight=random(hidden, width, size=width**-0.5),
        up_bias=random(hidden),
        down_weight=random(width, hidden, size=hidden**-0.5),
        down_bias=random(width),
        scale2=1 + random(width),
        num_heads=case.heads,
    )
    return experts.to(case.device, getattr(torch, case.dtype))


def inputs(case: Case, name: str) -> tuple[Tensor, Tensor, StackedExperts]:
    generator = torch.Generator().manual_seed(1)
    count = 1 if name in ONE else case.experts
    tokens = torch.randn(case.batch, case.tokens, case.width, generator=generator)
    expert = (torch.arange(case.batch) % count)[torch.randperm(case.batch, generator=generator)]
    return tokens.to(case.device, getattr(torch, case.dtype)), expert.to(case.device), stacked(case, count)


# ---- measuring


def run(case: Case, job: Job, given: tuple[Tensor, Tensor, StackedExperts]) -> None:
    with torch.set_grad_enabled(case.train):
        out = job(*given)
        if case.train and out.requires_grad:
            given[2].zero_grad()
            out.sum().backward()


def timed(case: Case, job: Job, given: tuple[Tensor, Tensor, StackedExperts]) -> float:
    """Seconds, by the device's own clock if it has one."""
    if case.device == "cpu":
        started = time.perf_counter()
        run(case, job, given)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(case, job, given)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def medians(case: Case, rounds: int) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in jobs(case)}
    # Two sets of tokens in turn: one is never in the cache when its turn comes.
    given = {name: inputs(case, name) for name in found}
    others = {name: (x.clone(), *rest) for name, (x, *rest) in given.items()}
    for turn in range(rounds + 1):
        for name, job in jobs(case).items():
            seconds = timed(case, job, (others if turn % 2 else given)[name])
            if turn:  # the first round warms up
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


@torch.no_grad()
def compare(case: Case) -> None:
    """All jobs of a kind must give the same, else their times say nothing."""
    tolerance = 1e-3 if case.dtype == "float32" else 0.1
    for group in (ONE, ROUTED):
        found = [job(*inputs(case, name)).float() for name, job in group.items()]
        first = found[0][:, 0]
        for other in found[1:]:
            torch.testing.assert_close(other if other.ndim == 2 else other[:, 0], first, rtol=0, atol=tolerance)


def peak(case: Case, name: str) -> float:
    """MiB that a job adds at its peak, measured in a process of its own."""
    return in_own_process("expert_dispatch", f"measure(Case(**{asdict(case)!r}), {name!r})")


def measure(case: Case, name: str) -> float:
    """MiB that a job adds to this process."""
    given, job = inputs(case, name), jobs(case)[name]
    run(case, job, (given[0][:1], given[1][:1], given[2]))  # warms up; gradients are counted only once
    if case.device == "cpu":
        return added_at_peak(lambda: run(case, job, given))[1]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case, job, given)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(case: Case, seconds: dict[str, float]) -> dict[str, float]:
    """What the device reaches, and what share of it ours does: of bandwidth and of arithmetic."""
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    tokens = case.batch * case.tokens * case.width
    weights = case.experts * 12 * case.width**2
    flops = 2 * case.batch * case.tokens * case.width * (12 * case.width + 2 * case.tokens)
    a = torch.randn(8192, 8192, device=case.device, dtype=getattr(torch, case.dtype))
    matmul: Job = lambda *_: a @ a  # noqa: E731
    given = inputs(case, "class token, ours")
    square = min(timed(case, matmul, given) for _ in range(5))
    bandwidth, arithmetic = 2 * tokens * size / seconds["copy of the tokens"], 2 * 8192**3 / square
    return {
        "bytes_per_second": bandwidth,
        "flop_per_second": arithmetic,
        "class_token_share_of_bandwidth": (tokens + weights) * size / seconds["class token, ours"] / bandwidth,
        "all_tokens_share_of_arithmetic": flops / seconds["all tokens, ours"] / arithmetic,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--batch", type=int, default=32 if device == "cpu" else 256)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--experts", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default=device)
    # On CUDA `grouped_mm` takes bfloat16 only.
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32" if device == "cpu" else "bfloat16"
    )
    parser.add_argument("--train", action="store_true")
    args = vars(parser.parse_args())
    rounds = args.pop("rounds")
    case = Case(**args)
    compare(case)
    seconds = medians(case, rounds)
    memory = {name: peak(case, name) for name in seconds}
    results = {
        "case": asdict(case),
        "rounds": rounds,
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
        "peak_mebibytes": memory,
        "class_token_times_faster": {
            "one expert": seconds["one expert, full block"] / seconds["one expert, class token"],
            "routed": seconds["all tokens, ours"] / seconds["class token, ours"],
        },
        "usual_over_ours": {
            f"{of}, {way}": seconds[f"{of}, {way}"] / seconds[f"{of}, ours"]
            for of, way in (name.split(", ") for name in ROUTED)
            if way != "ours"
        },
        "ceilings": ceilings(case, seconds) if case.device != "cpu" else None,
        "environment": environment(),
    }
    publish(RESULT, results)
    for name, value in seconds.items():
        print(f"{name:28s} {1000 * value:9.3f} ms  {memory[name]:9.1f} MiB")
    print(json.dumps({key: results[key] for key in ("class_token_times_faster", "usual_over_ours", "ceilings")}))


if __name__ == "__main__":
    main()
