"""IIM on the protocol `tiny-imagenet-100`: shots, forms, negatives, seeds, and the ablations of the paper's Table 2.

    uv run python benchmarks/iim.py --packs ../shared/data --work ~/.cache/ood-iim --shots 4 16

Every run is a folder in --work; finished ones are read back and interrupted ones resume, so it may be stopped at any
time. Writes benchmarks/results/iim.json from the runs that are finished, which `tools/make_docs.py` turns into
docs/benchmarks.md. Training uses the plain features of the shots (no augmentation).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ood_core import create_backbone, extract
from ood_core._files import write_json
from ood_core.backbones.base import Backbone
from ood_core.evaluation import environment
from ood_iim.studies import STUDIES, Sets, summarise, trial
from tiny_imagenet_100 import fit_images, test_sets

RESULT = Path(__file__).parent / "results" / "iim.json"
VARIATIONS: dict[str, dict[str, Any]] = {
    "k = 8": {"k": 8, "train_k": 8},
    "k = 4": {"k": 4, "train_k": 4},
    "C_n = 100": {"negative_prompts": 100},
    "C_n = 30": {"negative_prompts": 30},
    "learning rate x 10": {"learning_rate": 2.5e-3},
    "learning rate x 40": {"learning_rate": 1e-2},
    "text projection frozen": {"train_text_projection": False},
    "context from words": {"context_init": "a photo of a "},
}


def protocol(packs: Path, backbone: Backbone, cache: str | None) -> Sets:
    """The test sets as features, extracted once for all runs."""
    fit, needs = fit_images(packs), {"image", "local"}
    features = {name: extract(backbone, source, needs, cache=cache) for name, source in test_sets(packs).items()}
    return Sets(fit, features.pop("id"), features, fit.label_names)


def settings(shots: list[int], which: list[str]) -> dict[str, dict[str, Any]]:
    """Label -> shots, number of seeds and options of all runs asked for, the most telling first."""
    found: dict[str, dict[str, Any]] = {}
    for count in shots:
        if "main" in which:
            for form in ("paper", "released"):
                found[f"{count} shots, {form}"] = {
                    "shots": count,
                    "seeds": 3,
                    "options": {"form": form, "loss_form": form},
                }
    for label, options in STUDIES["losses"].items() if "losses" in which else ():
        found[f"Table 2: {label}"] = {"shots": shots[0], "seeds": 1, "options": options}
    for label, options in VARIATIONS.items() if "variations" in which else ():
        found[f"variation: {label}"] = {"shots": shots[0], "seeds": 1, "options": options}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True, help="folder with the parquet packs")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cache", help="feature cache")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shots", type=int, nargs="+", default=[4])
    parser.add_argument("--seeds", type=int, help="instead of 3 (main) and 1 (the others)")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--which", nargs="+", default=["main", "losses", "variations"])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype=args.dtype)
    sets = protocol(args.packs, backbone, args.cache)
    done = json.loads(args.out.read_text())["settings"] if args.out.exists() else {}
    for label, setting in settings(args.shots, args.which).items():
        options = setting["options"] | {"epochs": args.epochs}
        runs = [
            trial(
                sets,
                backbone,
                shots=setting["shots"],
                seed=seed,
                folder=args.work.expanduser() / label.replace(" ", "-").replace(":", "") / f"seed-{seed}",
                options=options,
                features=True,
                cache=args.cache,
            )
            for seed in range(1, 1 + (args.seeds or setting["seeds"]))
        ]
        scores = summarise(runs)
        done[label] = {
            "shots": setting["shots"],
            "seeds": len(runs),
            "options": options,
            "scores": scores,
            "losses": runs[0]["losses"],
            "epoch_seconds": runs[0]["epoch_seconds"],
        }
        write_json(
            args.out,
            {"protocol": "tiny-imagenet-100", "settings": done, "environment": runs[0]["environment"] | environment()},
        )
        best = scores["s_mcm"]
        print(
            f"{label}: near {best['near']['auroc'][0]:.4f}, average {best['average']['auroc'][0]:.4f}, "
            f"accuracy {best['accuracy'][0]:.4f}, losses {runs[0]['losses']}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
