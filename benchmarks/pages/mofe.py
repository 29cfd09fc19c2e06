from __future__ import annotations

from collections.abc import Sequence

from pages import MEASURES, hardware, over_seeds, table

TITLE = "MoFE on real photographs"


KNN = ("knn", "knn_global")


def mofe_rows(found: dict[str, list[dict]], scores: Sequence[str] = ()) -> list[list[str]]:
    rows = []
    for label, runs in found.items():
        for name in (name for name in runs[0]["scores"] if not scores or name in scores):
            figures = [run["scores"][name] for run in runs]
            places = ([f["per_set"]["near"] for f in figures], [f["far_mean"] for f in figures])
            measured = [[f[measure] for f in at] for at in places for measure in MEASURES]
            accuracy = [f["accuracy"] for f in figures if "accuracy" in f]
            rows.append([label, name, f"{len(runs)}", *map(over_seeds, [*measured, accuracy])])
    return rows


def section(results: dict) -> str:
    settings, backbone = results["settings"], results["environment"]["backbone"]
    crops = "new crops in every epoch" if settings["augment"] else "centre crops, whose tokens are kept"
    header = ["training", "score", "seeds", "near AUROC", "near FPR95", "far AUROC", "far FPR95", "accuracy"]
    spread = [[label, f"{dimensions:.1f}"] for label, dimensions in results["dimensions"].items()]
    varied = [[label, name, *rest] for label, name, _, *rest in mofe_rows(results["variations"], KNN)]
    return f"""## {TITLE}

Protocol `tiny-imagenet-100`, image tower of backbone `{backbone["spec"]}` (fingerprint
`{backbone["fingerprint"][:12]}`), the class token behind the final norm; percent, mean and standard deviation over
seeds. Trained on {settings["images"]:,} images of the split `fit` (a tenth of them held out for Dynamic-beta):
{settings["experts"]} experts, {settings["epochs"]} epochs, batches of {settings["batch_size"]}, {crops}; rates
{settings["learning_rate"]:g} for experts and {settings["head_learning_rate"]:g} for heads, higher than the defaults,
which are for a thousand classes with 1.3 million images.

{table(header, mofe_rows(results["runs"]))}
Over how many directions the features of the ID test images spread (participation ratio of their variances, first seed):

{table(["training", "effective dimensions"], spread)}
One seed, {settings["sweep_epochs"]} epochs; images are mixed only where the row names it:

{table(["varied", "score", *header[3:]], varied)}
Where features lie before and after, in the plane in which those of known images spread most:

![features of known and unknown images](mofe_features.png)

Made by `uv run python benchmarks/mofe.py --packs FOLDER --work FOLDER`; {hardware(results["environment"])}.
"""
