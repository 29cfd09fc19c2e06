"""SeTAR, SeTAR+FT and LoRA on the protocol `tiny-imagenet-100`, with what the search chose, and variations.

    uv run python benchmarks/setar.py --packs ../shared/data --work ~/.cache/ood-setar

Search and fine-tuning see the shots drawn from `fit`, never an OOD image. Every run is a folder in --work; finished
ones are read back and an interrupted search resumes. Writes benchmarks/results/setar.json from the runs that are
finished, which `tools/make_docs.py` turns into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import publish
from ood_core import FeatureSet, FewShot, create_backbone, create_detector, evaluate
from ood_core.backbones.base import Backbone
from ood_core.data import load_batches
from ood_core.data.sources import ImageSource
from ood_core.evaluation import environment
from ood_core.files import write_json
from ood_setar.edit import SeTAREdit
from ood_setar.finetune import finetune, lora
from ood_setar.network import image_features
from ood_setar.search import search, visiting_order
from tiny_imagenet_100 import fit_images, test_sets, with_far_mean

RESULT = Path(__file__).parent / "results" / "setar.json"
SCORES: dict[str, dict[str, Any]] = {"mcm": {}, "gl_mcm": {}}
NEG_LABEL: dict[str, dict[str, Any]] = {"neg_label": {"max_words": 4000}}  # of each list; all take minutes per tower
VARIATIONS: dict[str, dict[str, Any]] = {
    "lambda 0.01": {"ood_weight": 0.01},
    "lambda 0.5": {"ood_weight": 0.5},
    "K 10": {"k": 10},
    "K 60": {"k": 60},
    "all up to 80 %": {"ratios": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]},
    "W_down": {"kind": "down"},
    "W_v": {"kind": "value"},
    "W_o": {"kind": "out"},
    "text first": {"order": "text_visual"},
    "exhaustive": {"order": "exhaustive"},
    "principal": {"drop": "principal"},
    "random": {"drop": "random"},
}

Make = Callable[[Backbone, ImageSource, Path], SeTAREdit]


def settings(shots: list[int], which: list[str], seeds: Sequence[int] = ()) -> dict[str, tuple[int, Make]]:
    """Label -> shots and how the edit is made; fine-tuning starts from the search of the same shots."""
    found: dict[str, tuple[int, Make]] = {}
    for count in shots if "main" in which else ():
        found[f"SeTAR, {count} per class"] = (count, lambda b, s, f: search(b, s, log_file=f / "search.jsonl"))
    count = shots[-1]
    for seed in seeds if "finetune" in which else ():
        found[f"SeTAR+FT, {count} per class, seed {seed}"] = (count, _tuned(seed, lora_rank=None))
        found[f"LoRA, {count} per class, seed {seed}"] = (count, _tuned(seed, lora_rank=32))
    for label, options in VARIATIONS.items() if "variations" in which else ():
        found[f"variation: {label}"] = (count, _varied(options))
    return found


def _tuned(seed: int, lora_rank: int | None) -> Make:
    def make(backbone: Backbone, shots: ImageSource, folder: Path) -> SeTAREdit:
        if lora_rank:
            start = lora(backbone, visiting_order(backbone.linears()), rank=lora_rank, seed=seed)
        else:
            start = search(backbone, shots, log_file=folder.parent / f"search-{len(shots)}.jsonl")
        return finetune(backbone, shots, start, seed=seed, checkpoint=folder / "checkpoint.safetensors")

    return make


def _varied(options: dict[str, Any]) -> Make:
    return lambda backbone, shots, folder: search(backbone, shots, log_file=folder / "search.jsonl", **options)


class Sets:
    """All test sets as inputs of the first block: no edit changes what lies below it, which is most of the work."""

    def __init__(self, backbone: Backbone, packs: Path) -> None:
        self.kept = {name: self._embed(backbone, source) for name, source in test_sets(packs).items()}

    @staticmethod
    @torch.no_grad()
    def _embed(backbone: Backbone, source: ImageSource) -> tuple[FeatureSet, torch.Tensor]:
        batches = load_batches(source, backbone.transform, batch_size=100, progress=False)
        tokens = torch.cat([backbone.embed(backbone.prepare(batch.pixels)) for batch in batches])
        labels = None if source.labels is None else torch.as_tensor(source.labels)
        plain = FeatureSet(list(source.ids), labels, list(source.label_names), source=source.fingerprint)
        return plain, tokens

    @torch.no_grad()
    def features(self, backbone: Backbone) -> dict[str, FeatureSet]:
        """Image and local features of every set."""
        found = {}
        for name, (plain, tokens) in self.kept.items():
            parts = [image_features(backbone, _below_last(backbone, part)) for part in tokens.split(100)]
            image, local = map(torch.cat, zip(*parts, strict=True))
            found[name] = replace(
                plain,
                image=image,
                local=local,
                backbone=backbone.spec,
                fingerprint=backbone.fingerprint,
                grid=backbone.grid,
            )
        return found


def _below_last(backbone: Backbone, x: torch.Tensor) -> torch.Tensor:
    for layer in backbone.layers()[:-1]:
        x = layer(x)
    return x


def judge(backbone: Backbone, sets: Sets, class_names: list[str], scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of every score on all sets."""
    features = sets.features(backbone)
    detectors = {
        name: create_detector(name, backbone=backbone, class_names=class_names, **options)
        for name, options in scores.items()
    }
    return with_far_mean(evaluate(detectors, id=features.pop("id"), ood=features).results["detectors"])


def minor_energy(backbone: Backbone, share: float = 0.4) -> dict[str, list[float]]:
    """Share of the squared singular values in the smallest `share` of them: of every weight, and of a random one."""

    def energy(weight: torch.Tensor) -> float:
        squares = torch.linalg.svdvals(weight.double()).square()
        return (squares[-round(share * len(squares)) :].sum() / squares.sum()).item()

    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in visiting_order(backbone.linears()):
        weight = backbone.linear(name).weight
        found[name] = [energy(weight), energy(torch.randn(weight.shape, generator=generator))]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True, help="folder with the parquet packs")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="of the fine-tuning")
    parser.add_argument("--which", nargs="+", default=["main", "finetune", "variations"])
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS, default=list(VARIATIONS), metavar="LABEL")
    parser.add_argument("--resume", action="store_true", help="add to the runs in --out")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype="float32")
    work = args.work.expanduser() / backbone.fingerprint[:12]
    fit = fit_images(args.packs)
    names, every = fit.label_names, SCORES | NEG_LABEL
    sets = Sets(backbone, args.packs)
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() and args.resume else {}
    runs["vanilla"] = _kept(work / "vanilla", lambda _: {"scores": judge(backbone, sets, names, every)})
    energy = minor_energy(backbone)
    main_runs = settings(args.shots, ["main"])
    left_out = {f"variation: {label}" for label in VARIATIONS if label not in args.variations}
    for label, (shots, make) in settings(args.shots, args.which, args.seeds).items():
        if label in left_out:
            continue
        train = FewShot(fit, shots, seed=1)

        def run(folder: Path, label: str = label, make: Make = make, train: ImageSource = train) -> dict[str, Any]:
            started = time.perf_counter()
            edit = make(backbone, train, folder)
            seconds = time.perf_counter() - started
            edit.save_pretrained(folder / "edit")
            scores = judge(edit.apply(backbone), sets, names, every if label in main_runs else SCORES)
            steps = edit.record.get("steps", [])
            near_ties = sum(step["near_tie"] for step in steps)
            path = [steps[0]["candidates"]["0"]["loss"], steps[-1]["value"]] if steps else []
            found = {"scores": scores, "ratios": edit.ratios, "seconds": seconds, "near_ties": near_ties}
            return found | {"search": path, "losses": edit.record.get("history", [])[-1:]}

        runs[label] = _kept(work / label.replace(" ", "-").replace(":", "").replace("%", ""), run)
        near, far = (runs[label]["scores"]["mcm"][key] for key in ("per_set", "far_mean"))
        print(f"{label}: near {near['near']['auroc']:.4f}, far {far['auroc']:.4f}, {runs[label]['ratios']}", flush=True)
        about = environment() | {"backbone": {"spec": args.backbone, "fingerprint": backbone.fingerprint}}
        found = {"protocol": "tiny-imagenet-100", "runs": runs, "minor_energy": energy, "environment": about}
        publish(args.out, found)
    return 0


def _kept(folder: Path, run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What a run found, read back if it is finished."""
    file = folder / "results.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, run(folder))
    return json.loads(file.read_text())


if __name__ == "__main__":
    sys.exit(main())
