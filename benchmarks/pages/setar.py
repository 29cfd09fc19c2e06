from __future__ import annotations

from pages import hardware, over_seeds, seeds_cell, table

TITLE = "SeTAR on real photographs"


def section(results: dict) -> str:
    seeds: dict[str, list[dict]] = {}
    for label, run in results["runs"].items():
        seeds.setdefault(label.partition(", seed")[0], []).append(run)
    sets = list(results["runs"]["vanilla"]["scores"]["mcm"]["per_set"])
    rows, by_set, chosen = [], [], []
    for label, runs in seeds.items():
        name_of = label if len(runs) == 1 else f"{label}, {len(runs)} seeds"
        for name in runs[0]["scores"]:
            figures = [run["scores"][name] for run in runs]
            groups = [[f["per_set"]["near"] for f in figures], [f["far_mean"] for f in figures]]
            groups.append([f["average"] for f in figures])
            accuracy = [f["accuracy"] for f in figures if "accuracy" in f]
            rows.append([name_of, name, *map(seeds_cell, groups), over_seeds(accuracy)])
            if name in ("mcm", "gl_mcm") and not label.startswith("variation"):
                cells = [over_seeds([f["per_set"][one]["auroc"] for f in figures]) for one in sets]
                by_set.append([name_of, name, *cells])
        if "ratios" in runs[0] and not label.startswith("LoRA"):
            dropped = ", ".join(f"{name} {ratio:g}" for name, ratio in runs[0]["ratios"].items() if ratio) or "nothing"
            path = " to ".join(f"{value:.4f}" for value in runs[0]["search"])
            chosen.append([label, dropped, path, f"{runs[0]['near_ties']}"])
    backbone = results["environment"]["backbone"]
    words = results["runs"]["vanilla"]["scores"]["neg_label"]["params"]["max_words"]
    energies = [
        [name, f"{100 * ours:.1f}", f"{100 * other:.1f}"] for name, (ours, other) in results["minor_energy"].items()
    ]
    return f"""## {TITLE}

Protocol `tiny-imagenet-100`, backbone `{backbone["spec"]}` (fingerprint `{backbone["fingerprint"][:12]}`):
AUROC / FPR95 in percent, with and without an edit that was searched on images of the split `fit`; the average is over
the near and the far sets. NegLabel takes {words:,} words of each of its lists. Fine-tuning: mean and standard deviation
over its seeds.

{table(["backbone", "score", "near", "far mean", "average", "accuracy"], rows)}
AUROC by set:

{table(["backbone", "score", *sets], by_set)}
What was dropped, the value of the search from the original weights to the end, and decisions within float32's noise:

{table(["run", "share of singular values", "search value", "near ties"], chosen)}
The share of a weight's squared norm, in percent, that the smallest 40 % of its singular values hold. The smaller it is
beside that of a random matrix, the more these directions are a remainder that can be dropped:

{table(["weight", "of the backbone", "of a random matrix"], energies)}
Made by `uv run python benchmarks/setar.py --packs FOLDER --work FOLDER`; {hardware(results["environment"])}.
"""
