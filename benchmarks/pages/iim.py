from __future__ import annotations

from collections.abc import Sequence

from pages import hardware, over_seeds, seeds_cell, table

TITLE = "IIM on real photographs"


def section(results: dict) -> str:
    zero, settings, groups = results["zero_shot"], results["settings"], ("near", "far_mean")

    def row(label: str, name: str, figures: list[dict]) -> list[str]:
        accuracy = over_seeds([f["accuracy"] for f in figures])
        return [label, name, *(seeds_cell([f[group] for f in figures]) for group in groups), accuracy]

    def rows(label: str, names: Sequence[str]) -> list[list[str]]:
        shown = label.partition(": ")[2] or label
        return [row(shown, name, [run["scores"][name] for run in settings[label]["runs"]]) for name in names]

    def change(label: str, name: str, group: str) -> str:
        before = zero["s_mcm"][group]["auroc"]
        return over_seeds([run["scores"][name][group]["auroc"] - before for run in settings[label]["runs"]], "+")

    def alone(label: str, term: str) -> list[str]:
        runs = settings[label]["runs"]
        return [label, term, *(over_seeds([run["terms"][term][group] for run in runs]) for group in groups)]

    main = [label for label in settings if ": " not in label]
    zero_rows = [
        row("zero-shot", name, [zero[key]])
        for key, name in {"mcm": "mcm", "gl_mcm": "gl_mcm", "r_mcm": "r_mcm*", "s_mcm": "s_mcm*"}.items()
    ]
    main_rows = [r for label in main for r in rows(label, ("mcm", "gl_mcm", "r_mcm*", "r_mcm", "s_mcm*", "s_mcm"))]
    changes = [[label, *(change(label, name, g) for name in ("s_mcm*", "s_mcm") for g in groups)] for label in main]
    terms = [["zero-shot", term, *(over_seeds([f[g]]) for g in groups)] for term, f in results["terms"].items()]
    terms += [alone(label, term) for label in main for term in settings[label]["runs"][0]["terms"]]
    mined = [[ranks, f"{100 * share:.1f}"] for ranks, share in results["mined"].items()]
    header = ["prompts", "score", "near", "far", "accuracy"]
    studies = []
    for kind, title in {
        "Table 2": "Parts of the loss, as the paper's Table 2",
        "variation": "One setting changed",
    }.items():
        if labels := [label for label in settings if label.startswith(kind)]:
            found = [r for label in labels for r in rows(label, ("s_mcm*", "s_mcm"))]
            studies.append(f"{title} ({settings[labels[0]]['shots']} shots, seed 1):\n\n{table(header, found)}")
    backbone = results["environment"]["backbones"][0]
    return f"""## {TITLE}

Protocol `tiny-imagenet-100`, backbone `{backbone["spec"]}` (fingerprint `{backbone["fingerprint"][:12]}`): AUROC /
FPR95 in percent, and accuracy, before the training (hand-written prompts) and after it: mean and standard deviation
over seeds. A star ignores the negatives; MCM reads hand-written prompts only.

{table(header, zero_rows + main_rows)}
What the training changes: AUROC minus that of zero-shot S-MCM*, in points:

{table(["prompts", "s_mcm*, near", "s_mcm*, far", "s_mcm, near", "s_mcm, far"], changes)}
AUROC of each term of S-MCM alone:

{table(["prompts", "term", "near", "far"], terms)}
Hard negatives should not show the class. Share of patches of ID test images whose best class is the right one, in
percent, by their rank for that class; L_neg takes the second line for OOD:

{table(["rank", "right class"], mined)}
{chr(10).join(studies)}
Made by `uv run python benchmarks/iim.py --packs FOLDER --work FOLDER`; {hardware(results["environment"])}.
"""
