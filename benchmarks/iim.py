"""IIM on the protocol `tiny-imagenet-100`: shots, forms, negatives, seeds, and the ablations of the paper's Table 2.

    uv run python benchmarks/iim.py --packs ../shared/data --work ~/.cache/ood-iim --shots 4 16

Every run is a folder in --work; finished ones are read back and interrupted ones resume, so it may be stopped at any
time. Writes the runs that are finished and the zero-shot scores on the same features to benchmarks/results/iim.json,
which `tools/make_docs.py` turns into docs/benchmarks.md. Training uses the plain features of the shots (no
augmentation).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from harness import publish
from ood_core import create_backbone, create_detector, evaluate, extract
from ood_core.backbones.base import Backbone
from ood_core.detectors.zero_shot import default_k
from ood_core.metrics import auroc
from ood_core.prompts import text_features
from ood_core.scores import ScoreTable
from ood_iim import IIM
from ood_iim.studies import STUDIES, Sets, trial
from tiny_imagenet_100 import ZERO_SHOT, fit_images, test_sets, with_far_mean

RESULT = Path(__file__).parent / "results" / "iim.json"
MAIN: dict[str, dict[str, Any]] = {
    "paper": {"form": "paper", "loss_form": "paper"},
    "released": {"form": "released", "loss_form": "released"},
}
VARIATIONS: dict[str, dict[str, Any]] = {
    "k = 8": {"k": 8, "train_k": 8},
    "k = 4": {"k": 4, "train_k": 4},
    "C_n = 100": {"negative_prompts": 100},
    "C_n = 30": {"negative_prompts": 30},
    "learning rate x 10": {"learning_rate": 2.5e-3},
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
        for label, options in MAIN.items() if "main" in which else ():
            found[f"{count} shots, {label}"] = {"shots": count, "seeds": 3, "options": options}
    if "main" in which:
        found[f"{shots[0]} shots, without L_neg"] = {"shots": shots[0], "seeds": 3, "options": {"lambda_neg": 0.0}}
    for label, options in STUDIES["losses"].items() if "losses" in which else ():
        found[f"Table 2: {label}"] = {"shots": shots[0], "seeds": 1, "options": options}
    for label, options in VARIATIONS.items() if "variations" in which else ():
        found[f"variation: {label}"] = {"shots": shots[0], "seeds": 1, "options": options}
    return found


def figures(detectors: dict[str, Any]) -> dict[str, Any]:
    """Of every score the AUROC and FPR95 near and far, and the accuracy."""
    found = {}
    for name, one in with_far_mean(detectors).items():
        groups = {"near": one["per_set"]["near"], "far_mean": one["far_mean"]}
        found[name] = {group: {m: figure[m] for m in ("auroc", "fpr95")} for group, figure in groups.items()}
        found[name]["accuracy"] = one["accuracy"]
    return found


def terms(scores: ScoreTable, *, zero_shot: bool = False) -> dict[str, dict[str, float]]:
    """AUROC near and far of each term of S-MCM alone, as differences of the scores that contain it."""
    star = "" if zero_shot else "*"
    pairs = {"image to text*": (f"r_mcm{star}", "mcm"), "text to image": (f"s_mcm{star}", f"r_mcm{star}")}
    if not zero_shot:
        pairs["image to text"] = ("r_mcm", "mcm")
    found = {}
    for name, (whole, rest) in pairs.items():
        values = {one: scores.scores(whole, one) - scores.scores(rest, one) for one in scores.frame["source"].unique()}
        by_set = {one: auroc(values["id"], value) for one, value in values.items() if one != "id"}
        found[name] = {"near": by_set.pop("near"), "far_mean": statistics.fmean(by_set.values())}
    return found


def mined(sets: Sets, backbone: Backbone) -> dict[str, float]:
    """Share of the ID test images' patches whose best class is the label's, by their rank for that class.

    Hard negatives should not show the class: what L_neg takes for OOD are the ranks k + 1 to 2k.
    """
    local, labels = sets.test.local, sets.test.labels[:, None]
    cosines = local @ text_features(backbone, list(sets.class_names), IIM.default_template).T
    right = (cosines.argmax(2) == labels).float()
    of_label = cosines.gather(2, labels[..., None].expand(-1, local.shape[1], 1)).squeeze(2)
    right = right.gather(1, of_label.argsort(1, descending=True))
    k = default_k(None, local.shape[1])
    ranks = {f"1 to {k}": slice(k), f"{k + 1} to {2 * k}": slice(k, 2 * k), f"behind {2 * k}": slice(2 * k, None)}
    return {name: right[:, part].mean().item() for name, part in ranks.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True, help="folder with the parquet packs")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cache", help="feature cache")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16], help="the first is that of the variations")
    parser.add_argument("--seeds", type=int, help="instead of 3 (main) and 1 (the others)")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--which", nargs="+", default=["main", "losses", "variations"])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    backbone = create_backbone(args.backbone, dtype=args.dtype)
    sets = protocol(args.packs, backbone, args.cache)
    plain = {name: create_detector(name, backbone=backbone, class_names=sets.class_names) for name in ZERO_SHOT}
    judged = evaluate(plain, id=sets.test, ood=sets.ood)
    results = {
        "protocol": "tiny-imagenet-100",
        "zero_shot": figures(judged.results["detectors"]),
        "terms": terms(judged.scores, zero_shot=True),
        "mined": mined(sets, backbone),
        "settings": {},
        "environment": judged.results["environment"],
    }
    kept = json.loads(args.out.read_text()) if args.out.exists() else results
    if kept["environment"]["backbones"] == results["environment"]["backbones"]:  # else they are of other weights
        results["settings"] = kept["settings"]
    for label, setting in settings(args.shots, args.which).items():
        options = setting["options"] | {"epochs": args.epochs}
        runs = []
        for seed in range(1, 1 + (args.seeds or setting["seeds"])):
            folder = args.work.expanduser() / label.replace(" ", "-").replace(":", "") / f"seed-{seed}"
            run = trial(
                sets,
                backbone,
                shots=setting["shots"],
                seed=seed,
                folder=folder,
                options=options,
                features=True,
                cache=args.cache,
            )
            runs.append(
                {"seed": seed, "scores": figures(run["detectors"])}
                | {"terms": terms(ScoreTable.read(folder / "scores.parquet"))}
                | {key: run[key] for key in ("losses", "epoch_seconds")}
            )
        results["settings"][label] = {"shots": setting["shots"], "options": options, "runs": runs}
        publish(args.out, results)
        for run in runs:
            found = run["scores"]
            near, far = ([found[name][key]["auroc"] for name in ("s_mcm*", "s_mcm")] for key in ("near", "far_mean"))
            print(f"{label}, seed {run['seed']}: near {near}, far {far}, losses {run['losses']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
