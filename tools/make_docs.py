"""Turn the results of benchmarks into docs/benchmarks.md, docs/tiny.md and the marked parts of other pages: no number
there is typed by hand.

uv run python tools/make_docs.py
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import plots

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURES = ("auroc", "fpr95")


def read(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(figure: dict[str, float]) -> str:
    text = f"{100 * figure['auroc']:.1f} / {100 * figure['fpr95']:.1f}"
    if "auroc_low" in figure:
        half = 50 * (figure["auroc_high"] - figure["auroc_low"])
        text += f" (±{half:.1f})"
    return text


def hardware(environment: dict) -> str:
    versions = environment["versions"]
    where = environment["gpu"] or f"{environment['threads']} {environment['machine']} CPU threads"
    return f"{where}, torch {versions['torch']}, open_clip {versions['open-clip-torch']}, {environment['date']}"


def protocol(results: dict) -> str:
    data = results["data"]
    sets = list(data["ood"])
    ordered = sorted(results["detectors"].items(), key=lambda item: -item[1]["average"]["auroc"])
    rows = [
        [name, cell(f["per_set"]["near"]), cell(f["far_mean"]), *(cell(f["per_set"][s]) for s in sets if s != "near")]
        for name, f in ordered
    ]
    backbone = results["environment"]["backbones"][0]
    notes = "\n".join(f"- {note}" for note in data["notes"])
    return f"""## Real photographs: protocol `tiny-imagenet-100`

AUROC / FPR95 in percent (convention `{data["convention"]}`), in brackets half the width of the 95 % bootstrap interval
of the AUROC ({data["bootstrap"]} replicates). Backbone `{backbone["spec"]}` ({backbone["dtype"]}, fingerprint
`{backbone["fingerprint"][:12]}`), {data["id"]["scored"]:,} ID test images. Zero-shot top-1 of this backbone over all
200 classes: {100 * results["zero_shot_top1"]:.1f} %. Tiny is not CLIP: these numbers compare methods, not models.

![AUROC of every detector](auroc.svg)

{table(["detector", "near", "far mean", *(s for s in sets if s != "near")], rows)}
{notes}

Made by `uv run python benchmarks/tiny_imagenet_100.py --packs FOLDER`; {hardware(results["environment"])}.
"""


def bfloat16(results: dict) -> str:
    rows = [
        [
            name,
            f"{100 * f['float32']:.2f}",
            f"{100 * f['bfloat16']:.2f}",
            f"{100 * (f['bfloat16'] - f['float32']):+.2f}",
        ]
        for name, f in results["detectors"].items()
    ]
    return f"""## What bfloat16 weights move

Average AUROC over the nine OOD sets of `tiny-imagenet-100`, in percent, with the weights of `tiny` in float32 and
bfloat16 (scores are float32 in both; backbone fingerprint
`{results["environment"]["backbones"][0]["fingerprint"][:12]}`).

{table(["detector", "float32", "bfloat16", "difference"], rows)}
Made by `uv run python benchmarks/bfloat16.py --packs FOLDER`.
"""


def extraction(results: dict) -> str:
    keys = [
        ("float32 bare images/s", "images/s"),
        ("float32 cold / bare", "cold / bare"),
        ("float32 cached / bare", "cached / bare"),
        ("bfloat16 bare images/s", "bf16 images/s"),
        ("bfloat16 cold / bare", "bf16 cold / bare"),
        ("bfloat16 bare / float32 bare", "bf16 / float32"),
    ]
    rows = [[name, *(f"{figures[key]:.3g}" for key, _ in keys)] for name, figures in results["results"].items()]
    return f"""## Extraction

`encode_dense` throughput: the bare model on images in memory, and the share of it that `extract` reaches from image
files (cold) and from its cache; medians over rounds in which the jobs alternate.

{table(["model, decoding processes", *(title for _, title in keys)], rows)}
Peak memory of the whole run {results["peak_mebibytes"]:,} MiB. Made by `uv run python benchmarks/extraction.py`;
{hardware(results["environment"])}.
"""


def topk_patch_softmax(results: dict) -> str:
    shape = results["shape"]
    rows = [
        [
            name,
            f"{results['milliseconds_per_image'][name]:.2f}",
            f"{results['times_bare_matmul'][name]:.2f}",
            f"{results['peak_mebibytes'][name]:,.0f}",
        ]
        for name in results["milliseconds_per_image"]
    ]
    return f"""## Patch matching on cached features

`topk_patch_softmax` at the shapes of CLIP ViT-B/16 on ImageNet-1k (P = {shape["P"]}, d = {shape["d"]}, C =
{shape["C"]:,}, M = {shape["M"]}, k = {shape["k"]}), {results["batch"]} images, against a bare matmul of the same
shapes, the plain way (two softmaxes over all entries) and six softmaxes as in the released code; medians of jobs that
alternate, memory in processes of their own.

{table(["job", "ms per image", "times the matmul", "peak MiB"], rows)}
Made by `uv run python benchmarks/topk_patch_softmax.py`; {hardware(results["environment"])}.
"""


def iim_training_step(results: dict) -> str:
    shapes = results["shapes"]
    small, *larger = shapes

    def prompts(shape: str) -> int:
        return sum(map(int, shape.split(" + ")))

    for shape in larger:
        if "usual" not in shapes[shape]:
            times = prompts(shape) / prompts(small)
            guess = {key: times * value for key, value in shapes[small]["usual"].items()}
            shapes[shape] = {f"usual, extrapolated: {times:g} x {small}": guess} | shapes[shape]
    rows = [
        [shape, name, f"{figures['seconds']:.2f}", f"{figures['mebibytes']:,.0f}"]
        for shape, jobs in shapes.items()
        for name, figures in jobs.items()
    ]
    return f"""## A training step of IIM

Classes + negatives on the text tower of ViT-B/16, batch 32: the usual way encodes every prompt at 77 tokens; ours cuts
behind the end mark, and "recomputed" holds the activations of 64 prompts at a time. All run through the same blocks at
the precision that `dtype="auto"` gives on this machine.

{table(["shape", "job", "seconds per step", "peak MiB"], rows)}
Made by `uv run python benchmarks/iim_training_step.py`; {hardware(results["environment"])}.
"""


def iim(results: dict) -> str:
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
    return f"""## IIM on real photographs

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


def iim_localisation(results: dict) -> str:
    rows = [
        [name, *(f"{100 * figures[key]:.1f}" for key in ("positive_on_object", "ood_beside_object"))]
        for name, figures in results["results"].items()
    ]
    return f"""## Where IIM mines

Share of mined positive patches that lie on the object and of mined OOD patches that do not, in percent, on generated
scenes with known masks.

{table(["prompts", "positive on the object", "OOD beside it"], rows)}
Made by `uv run python benchmarks/iim_localisation.py`; {hardware(results["environment"])}.
"""


def setar(results: dict) -> str:
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
    return f"""## SeTAR on real photographs

Protocol `tiny-imagenet-100`, backbone `{backbone["spec"]}` (fingerprint `{backbone["fingerprint"][:12]}`):
AUROC / FPR95 in percent, with and without an edit that was searched on images of the split `fit`; the average is over
the near and the far sets. NegLabel takes {words:,} words of each of its lists. Fine-tuning: mean and standard deviation
over its seeds.

{table(["backbone", "score", "near", "far mean", "average", "accuracy"], rows)}
AUROC by set:

{table(["backbone", "score", *sets], by_set)}
What was dropped, the value of the search from the original weights to the end, and decisions within float32's noise:

{table(["run", "share of singular values", "search value", "near ties"], chosen)}
A likely reason why little is gained: the smallest 40 % of the singular values hold this share of a weight's squared
norm, in percent. The optimiser that trained this backbone orthogonalises its steps, and its spectra are not much
steeper than a random matrix's: the minor directions are hardly a remainder of noise that could be dropped to gain.

{table(["weight", "of the backbone", "of a random matrix"], energies)}
Made by `uv run python benchmarks/setar.py --packs FOLDER --work FOLDER`; {hardware(results["environment"])}.
"""


def seeds_cell(figures: list[dict]) -> str:
    return " / ".join(over_seeds([figure[measure] for figure in figures]) for measure in ("auroc", "fpr95"))


def setar_search(results: dict) -> str:
    search, blocks = results["search"], results["ViT-B/16"]
    seconds = search["seconds"]
    rows = [
        [name, f"{value:.1f}", f"{search['candidates'][name]}", f"{value / seconds['ours']:.1f}"]
        for name, value in seconds.items()
    ]
    single = [
        [
            name,
            f"{b['plain']:.2f}",
            f"{b['ours']:.2f}",
            f"{b['plain'] / b['ours']:.1f}",
            f"{b['largest difference']:.1e}",
        ]
        for name, b in blocks["blocks"].items()
    ]
    agreed = "the same" if search["same ratios"] else "not the same"
    return f"""## SeTAR's search

The released way does for every candidate what the released code does: load the weights, decode the images, decompose
every weight that has a ratio, encode all prompts, run the whole image tower with the value path in all blocks. The
plain way is spared the loading, the decoding and the value path but in the last block. Random towers of 12 + 12 blocks,
{search["images"]} images, {search["classes"]} classes: all chose {agreed} ratios ({search["weights pruned"]} weights
pruned, smallest margin {search["smallest margin"]:.1e}); ours kept {search["mebibytes"]:,.0f} MiB.

{table(["search", "seconds", "candidates", "times ours"], rows)}
ViT-B/16 shapes, {blocks["images"]} images, {blocks["classes"]} classes: seconds for the eight ratios of one block
(its decomposition included), and the largest relative difference of a loss. Filling the caches takes
{blocks["preparing"]["seconds"]:.1f} s and {blocks["preparing"]["mebibytes"]:,.0f} MiB, once.

{table(["weight", "plain", "ours", "ratio", "difference"], single)}
Made by `uv run python benchmarks/setar_search.py`; {hardware(results["environment"])}.
"""


def spread(figure: dict | None) -> str:
    """Mean, and the standard deviation over runs where there are several, in percent."""
    if figure is None:
        return ""
    around = "" if figure["std"] is None else f" ± {100 * figure['std']:.1f}"
    return f"{100 * figure['mean']:.1f}{around}"


def interval(figure: dict) -> str:
    if figure["low"] is None:
        return spread(figure)
    return f"{spread(figure)} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def hvl_rows(found: dict) -> list[list[str]]:
    kinds = [(kind, measure) for kind in ("near", "far") for measure in ("auroc", "fpr95")]
    return [
        [name, spread(row["accuracy"]), interval(row["auroc"]), *(spread(row[kind][m]) for kind, m in kinds)]
        for name, row in found.items()
    ]


def hvl(results: dict) -> str:
    header = ["method", "accuracy", "AUROC", "near AUROC", "near FPR95", "far AUROC", "far FPR95"]
    found, backbone = results["results"], results["environment"]["backbone"]
    parts = [
        f"""## HVL on dermoscopy and histology

Percent; `hvl` divides a scale's probabilities by all tiles, `hvl_kept` by those kept (one training). Mean and standard
deviation over {len(results["settings"]["seeds"])} seeds, in brackets the 95 % interval of the mean; methods without
chance run once. Backbone `{backbone["spec"]}` (fingerprint `{backbone["fingerprint"][:12]}`), which saw no medical
image and is not CLIP: the table compares methods on one backbone, not with the paper. The AUROC is the average over
all OOD sets; near sets are of the same kind of image, far ones are not.
"""
    ]
    about = {
        "ham-4": "`ham-4`: nevus, melanoma, dermatofibroma and vascular lesion known; near: actinic keratosis, basal "
        "cell carcinoma, benign keratosis; far: histology, textures. Lesions of train and test are apart.",
        "histology-5": "`histology-5`: two of five tissues left out, average of the ten ways; far: dermoscopy.",
    }
    for name, text in about.items():
        if name in found:
            parts.append(f"{text}\n\n{table(header, hvl_rows(found[name]))}")
    titles = {
        "parts": "Parts of HVL (the paper's Table 2, and no lower scales)",
        "epochs": "Length of training, with and without cross-scale fusion (CSF)",
        "k": "Pseudo-OOD tiles K",
        "n": f"Partitions n, at most {results['settings']['images_in_study_of_n']} images per part",
    }
    for study, title in titles.items():
        for name, settings in found.get(study, {}).items():
            rows = [
                [label + (", `kept`" if name == "hvl_kept" else ""), *row[1:]]
                for label, of in settings.items()
                for name in ("hvl", "hvl_kept")
                for row in hvl_rows({name: of[name]})
            ]
            parts.append(f"{title}, `{name}`:\n\n{table(['setting', *header[1:]], rows)}")
    parts.append(
        "Made by `uv run python benchmarks/hvl.py --packs FOLDER --work FOLDER`; "
        + hardware(results["environment"])
        + "."
    )
    return "\n".join(parts) + "\n"


def hvl_boundary(results: dict) -> str:
    settings = results["settings"]
    rows = [[name, *(f"{100 * share:.1f}" for share in row.values())] for name, row in results["results"].items()]
    places = list(next(iter(results["results"].values())))
    return f"""## Where HVL finds its unknowns

Share of fine tiles that lie on the boundary of a lesion, in it or beside it, in percent, on {settings["test_images"]}
generated lesions with known masks, {settings["n"]} partitions, mean over {len(settings["seeds"])} seeds.

{table(["tiles", *places], rows)}
Made by `uv run python benchmarks/hvl_boundary.py`; {hardware(results["environment"])}.
"""


def hvl_cost(results: dict) -> str:
    r, s = results["results"], results["settings"]
    return f"""## What HVL costs

Backbone `{s["backbone"]}` (random weights, {s["dtype"]}), n = {s["n"]}, {s["classes"]} classes. A training step of
{s["batch"]} images takes {r["cached_step_ms"]:.0f} ms on cached embeddings and
{r["step_that_encodes_ms"] / 1000:,.0f} s when the tiles are encoded again: {r["ratio"]:,.0f} times as long. The cache
holds {r["cache_bytes_per_image"] / 1000:.1f} kB per image. Encoding runs at {r["encoded_images_per_second"]:.2f} images
({r["encoded_tiles_per_second"]:.1f} tiles) per second and takes {r["time_against_single_scale"]:.1f} times as long as
the whole image alone ({r["added_mib_three_scales"]:,.0f} against {r["added_mib_single_scale"]:,.0f} MiB); what HVL adds
behind the encoder takes {r["head_ms_per_image"]:.2f} ms per image.

Made by `uv run python benchmarks/hvl_cost.py`; {hardware(results["environment"])}.
"""


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


def mofe(results: dict) -> str:
    settings, backbone = results["settings"], results["environment"]["backbone"]
    crops = "new crops in every epoch" if settings["augment"] else "centre crops, whose tokens are kept"
    header = ["training", "score", "seeds", "near AUROC", "near FPR95", "far AUROC", "far FPR95", "accuracy"]
    spread = [[label, f"{dimensions:.1f}"] for label, dimensions in results["dimensions"].items()]
    varied = [[label, name, *rest] for label, name, _, *rest in mofe_rows(results["variations"], KNN)]
    return f"""## MoFE on real photographs

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


def together(results: dict) -> str:
    parts = [
        f"""## All methods together

Every detector with the options that the demo gives it, and fusions that were named in advance (`p_value` scale), on at
most {results["images"]:,} images per set: AUROC / FPR95 in percent, in brackets half the width of the 95 % bootstrap
interval of the AUROC. Backbone `{results["environment"]["backbone"]["spec"]}` (fingerprint
`{results["environment"]["backbone"]["fingerprint"][:12]}`): these numbers compare methods, not models.
"""
    ]
    for name, found in results["protocols"].items():
        ranked = sorted(found["detectors"].items(), key=lambda item: -item[1]["average"]["auroc"])
        kinds = sorted(set(found["data"]["set_kinds"].values()), reverse=True)
        rows = [[label, cell(f["average"]), *(mean_of_kind(f, found, kind) for kind in kinds)] for label, f in ranked]
        best = {what: next(row for row in ranked if ("fusion" in row[0]) == what) for what in (False, True)}
        gain = 100 * (best[True][1]["average"]["auroc"] - best[False][1]["average"]["auroc"])
        minus = best[True][1]["members_minus_this"][best[False][0]]
        parts.append(f"`{name}`:\n\n{table(['detector', 'average', *kinds], rows)}")
        parts.append(
            f"The best fusion here ({best[True][0]}) is {abs(gain):.1f} points {'above' if gain > 0 else 'below'} the "
            f"best member ({best[False][0]}), both picked by these very figures; 95 % interval of the difference "
            f"{-100 * minus['high']:+.1f} to {-100 * minus['low']:+.1f} (paired bootstrap).\n"
        )
    parts.append(
        "Made by `uv run python benchmarks/together.py --packs FOLDER --work FOLDER`; "
        + hardware(results["environment"])
        + "."
    )
    return "\n".join(parts) + "\n"


def mean_of_kind(figures: dict, found: dict, kind: str) -> str:
    chosen = [f for name, f in figures["per_set"].items() if found["data"]["set_kinds"][name] == kind]
    return cell({m: statistics.fmean(f[m] for f in chosen) for m in ("auroc", "fpr95")})


def expert_dispatch(results: dict) -> str:
    c, memory, faster = results["case"], results["peak_mebibytes"], results["class_token_times_faster"]
    rows = [[name, f"{ms:,.1f} ms", f"{memory[name]:,.0f} MiB"] for name, ms in results["milliseconds"].items()]
    usual = [[name, f"{ratio:.2f}"] for name, ratio in results["usual_over_ours"].items()]
    return f"""## Experts: the class token alone, and dispatch

{c["batch"]} images of {c["tokens"]} tokens, width {c["width"]}, {c["heads"]} heads, {c["experts"]} experts,
{c["dtype"]} on {c["device"]}; medians of {results["rounds"]} rounds. The class token alone is
{faster["one expert"]:.0f} times as fast as the block on all tokens with one expert, {faster["routed"]:.0f} times with
routing; all ways give the same.

{table(["way", "time", "memory added"], rows)}
{table(["usual way", "its time over ours"], usual)}
Made by `uv run python benchmarks/expert_dispatch.py`; {hardware(results["environment"])}.
"""


def mofe_training_step(results: dict) -> str:
    s = results["settings"]
    rows = [
        [name, f"{r['seconds']:.2f} s", f"{r['times_ours']:.2f}", f"{r['mebibytes']:,.0f} MiB"]
        for name, r in results["results"].items()
    ]
    return f"""## A training step of MoFE

All losses and gradients of {s["batch"]} clean and as many mixed images, {s["experts"]} experts, `{s["backbone"]}`
(random weights); the losses agree.

{table(["way", "time", "times ours", "memory added"], rows)}
Made by `uv run python benchmarks/mofe_training_step.py`; {hardware(results["environment"])}.
"""


def peers(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["peers"].items())
    parts = [
        f"""## Beside other libraries

The same job on the same random data, in one process; "difference" is the largest to our result ({versions}).
"""
    ]
    for task, found in results["results"].items():
        rows = [
            [name, f"{1000 * r['seconds']:,.0f} ms", f"{r['times_ours']:.2f}", f"{r['mebibytes']:,.0f} MiB", off(r)]
            for name, r in found.items()
        ]
        parts.append(f"{task}:\n\n{table(['library', 'time', 'times ours', 'memory added', 'difference'], rows)}")
    parts.append(f"Made by `uv run python benchmarks/peers.py`; {hardware(results['environment'])}.")
    return "\n".join(parts) + "\n"


def off(row: dict) -> str:
    return f"{row['difference']:.1e}" if row["difference"] else "0"


def over_seeds(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    around = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.1f}{around}"


def tiny_page() -> str:
    """How the embedded backbone was trained: trials, finished runs, the curve of the last one."""
    recipes = read("tiny_recipes") or {}
    parts = ["# How the embedded backbone was trained\n"]
    for part in recipes.values():
        header = list(dict.fromkeys(key for row in part["rows"] for key in row))
        rows = [[_shown(row.get(key)) for key in header] for row in part["rows"]]
        parts.append(f"{part['about'][0].upper()}{part['about'][1:]}.\n\n{table(header, rows)}")
    history = json.loads((ROOT / "shared/src/ood_core/tiny/config.json").read_text())["training"]["runs"]
    rows = [
        [f"{run['samples']:,}", f"{run['muon_lr']:g}", *(f"{100 * value:.1f}" for value in run["top1"].values())]
        for run in history
    ]
    parts.append(
        "The shipped weights, each run continuing from the one before; top-1 in percent on `val` by the text tower.\n\n"
        + table(["samples", "Muon", "image", "single patch", "mean of patches"], rows)
    )
    parts.append(
        "The weights that are shipped, and the runs they come from, are in "
        "[the model card](../shared/src/ood_core/tiny/MODEL_CARD.md). The last run, losses by images seen:\n\n"
        "![learning curves](tiny_curves.svg)\n"
    )
    return "\n".join(parts)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def curves() -> str:
    """The losses of the last run as an SVG."""
    with (RESULTS / "tiny_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {name.replace("_", " "): [float(row[name]) for row in rows] for name in ("image_loss", "patch_loss")}
    return plots.lines([float(row["samples"]) for row in rows], losses, "images", "losses over training images")


def auroc_picture() -> str:
    """Every detector on the protocol of photographs, with its interval."""
    found = json.loads((RESULTS / "tiny_imagenet_100.json").read_text())["detectors"]
    ranked = sorted(found.items(), key=lambda item: -item[1]["far_mean"]["auroc"])
    rows = {}
    for name, of in ranked:
        near, far = of["per_set"]["near"], of["far_mean"]
        rows[name] = {"near": bounds(near), "far, mean": bounds(far)}
    return plots.dots(rows, "AUROC of every detector on tiny-imagenet-100")


def bounds(figures: dict) -> tuple[float, float, float]:
    value = figures["auroc"]
    return value, figures.get("auroc_low", value), figures.get("auroc_high", value)


def speed_picture() -> str:
    """The time of the usual way over ours, in every comparison that was run."""
    rows: dict[str, float] = {}
    if found := read("topk_patch_softmax"):
        times = found["times_bare_matmul"]
        rows["S-MCM scores: two softmaxes in full"] = times["plain"] / times["ours"]
        rows["S-MCM scores: six softmaxes"] = times["released"] / times["ours"]
    if found := read("iim_training_step"):
        shape = found["shapes"]["100 + 30"]
        rows["IIM step: 77 tokens, one batch"] = shape["usual"]["seconds"] / shape["ours"]["seconds"]
    if found := read("setar_search"):
        times = found["search"]["seconds"]
        rows["SeTAR search: one forward per candidate"] = times["plain"] / times["ours"]
        rows["SeTAR search: as released"] = times["released"] / times["ours"]
    if found := read("hvl_cost"):
        rows["HVL step: tiles encoded again"] = found["results"]["ratio"]
    if found := read("mofe_training_step"):
        rows["MoFE step: gradients of everything"] = found["results"]["full autograd"]["times_ours"]
    if found := read("expert_dispatch"):
        rows["MoFE's last block: all tokens, one expert"] = found["class_token_times_faster"]["one expert"]
        rows |= {f"MoFE's experts: {name}": ratio for name, ratio in found["usual_over_ours"].items()}
    for job, ways in (read("peers") or {"results": {}})["results"].items():
        rows |= {f"{name}: {job.split(', ')[0]}": f["times_ours"] for name, f in ways.items() if name != "ours"}
    return plots.ratios(rows, "time of the usual way divided by ours")


def published(package: str, rows: Callable[[dict], list[list[str]]], header: list[str]) -> str:
    """The averages of a paper's first table, as it prints them."""
    found = json.loads(next((ROOT / "packages").glob(f"*/src/{package}/published/table1.json")).read_text())
    return f"{found['source']}, percent:\n\n{table(header, rows(found))}"


def printed(average: dict, *names: str) -> list[str]:
    return ["" if name not in average else f"{average[name]:.2f}" for name in names]


def paper_iim() -> str:
    def rows(found: dict) -> list[list[str]]:
        return [[r["id"], f"{r['shots']}", r["method"], *printed(r["average"], *MEASURES)] for r in found["rows"]]

    return published("ood_iim", rows, ["known", "images per class", "method", "AUROC", "FPR95"])


def paper_setar() -> str:
    def rows(found: dict) -> list[list[str]]:
        return [
            [
                r["id"],
                r["backbone"],
                r["score"],
                r["method"],
                r["origin"] or "",
                *printed(r["average"], *MEASURES),
            ]
            for r in found["rows"]
        ]

    return published("ood_setar", rows, ["known", "backbone", "score", "method", "origin", "AUROC", "FPR95"])


def paper_hvl() -> str:
    def rows(found: dict) -> list[list[str]]:
        return [[r["method"], *printed(r["average"], "accuracy", *MEASURES)] for r in found["rows"]]

    return published("ood_hvl", rows, ["method", "accuracy", "AUROC", "FPR95"])


def paper_mofe() -> str:
    def rows(found: dict) -> list[list[str]]:
        return [
            [r["backbone"], r["method"], *printed(r["average"], *MEASURES), *printed(r, "accuracy")]
            for r in found["rows"]
        ]

    return published("ood_mofe", rows, ["backbone", "method", "AUROC", "FPR95", "accuracy"])


def scaling() -> str:
    """What a billion images take at the rates that were measured."""
    parts = []
    for path in sorted(RESULTS.glob("extraction*.json")):
        results = json.loads(path.read_text())
        rows = [
            [name, dtype, f"{rate:,.1f}", f"{1e9 / 3600 / rate:,.0f}"]
            for name, figures in results["results"].items()
            for dtype in ("float32", "bfloat16")
            if (rate := figures.get(f"{dtype} cold images/s"))
        ]
        rates = table(["backbone, decoding processes", "weights", "images per second", "machine-hours for 1e9"], rows)
        parts.append(
            f"From image files to features, image and local ones, on {hardware(results['environment'])}:\n\n{rates}"
        )
    parts.append(f"Kept features are float32, 4 d bytes for an image and 4 P d for its P patches:\n\n{stored()}")
    if step := read("topk_patch_softmax"):
        shape, ours = step["shape"], step["milliseconds_per_image"]["ours"]
        parts.append(
            f"Behind the pass: the patch scores of {shape['C']:,} classes and {shape['M']} negatives take "
            f"{ours:.1f} ms per image on cached features of ViT-B/16, {1e9 / 3.6e6 * ours:,.0f} machine-hours for 1e9 "
            f"({hardware(step['environment'])}).\n"
        )
    return "\n".join(parts)


def stored() -> str:
    """Bytes per image of kept features."""
    tiny = json.loads((ROOT / "shared/src/ood_core/tiny/config.json").read_text())["model"]
    shapes = {"tiny": (tiny["embed_dim"], (tiny["image_size"] // tiny["patch_size"]) ** 2)}
    if step := read("topk_patch_softmax"):
        shapes["ViT-B/16 of CLIP"] = (step["shape"]["d"], step["shape"]["P"])
    sizes = {
        f"{name}, {what}": 4 * width * count
        for name, (width, patches) in shapes.items()
        for what, count in (("image", 1), (f"local ({patches} patches)", patches))
    }
    if cost := read("hvl_cost"):
        sizes[f"HVL's pyramid, n = {cost['settings']['n']}"] = cost["results"]["cache_bytes_per_image"]
    rows = [[name, f"{size:,}", f"{size / 1e3:,.1f}"] for name, size in sizes.items()]
    return table(["features", "bytes per image", "TB for 1e9"], rows)


FRAGMENTS: dict[str, tuple[str, Callable[[], str]]] = {
    "scaling": ("scaling.md", scaling),
    "iim": ("iim.md", paper_iim),
    "setar": ("setar.md", paper_setar),
    "hvl": ("hvl.md", paper_hvl),
    "mofe": ("mofe.md", paper_mofe),
}


def filled(text: str, name: str, fragment: str) -> str:
    """A page with what stands between its marks for `name` replaced."""
    start, end = f"<!-- made by tools/make_docs.py: {name} -->\n", "<!-- end -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{fragment}\n{end}{rest.split(end, 1)[1]}"


SECTIONS: dict[str, Callable[[dict], str]] = {
    "tiny_imagenet_100": protocol,
    "together": together,
    "iim": iim,
    "iim_localisation": iim_localisation,
    "setar": setar,
    "setar_search": setar_search,
    "hvl": hvl,
    "hvl_boundary": hvl_boundary,
    "hvl_cost": hvl_cost,
    "mofe": mofe,
    "mofe_training_step": mofe_training_step,
    "expert_dispatch": expert_dispatch,
    "bfloat16": bfloat16,
    "extraction": extraction,
    "topk_patch_softmax": topk_patch_softmax,
    "iim_training_step": iim_training_step,
    "peers": peers,
}

AWAITED = {
    "together": "All methods together",
    "setar": "SeTAR on real photographs",
    "hvl": "HVL on dermoscopy and histology",
    "hvl_boundary": "Where HVL finds its unknowns",
    "mofe": "MoFE on real photographs",
}
"""Sections on `tiny` that keep their place while nothing is measured on its present weights."""

OPENING = """# Benchmarks

The time of the usual way divided by ours, in every comparison below (logarithmic; below 1 the usual way is faster):

![time of the usual way divided by ours](speed.svg)
"""


def benchmarks_page() -> str:
    return "\n".join([OPENING, *filter(None, (section(name) for name in SECTIONS))])


def section(name: str) -> str:
    """A comparison's part of the page; where it is awaited, how to make it; nothing where it is optional."""
    results = read(name)
    if results is not None:
        return SECTIONS[name](results)
    if name not in AWAITED:
        return ""
    return (
        f"## {AWAITED[name]}\n\nNot measured with the present weights of `tiny` yet; those of earlier weights are left "
        f"out. Make it with `uv run python -m benchmarks {name} --packs FOLDER --work FOLDER`.\n"
    )


def made() -> dict[str, str]:
    """Everything in docs/ that comes from results, by file name."""
    found = {
        "benchmarks.md": benchmarks_page(),
        "tiny.md": tiny_page(),
        "tiny_curves.svg": curves(),
        "auroc.svg": auroc_picture(),
        "speed.svg": speed_picture(),
    }
    for name, (page, render_fragment) in FRAGMENTS.items():
        found[page] = filled((ROOT / "docs" / page).read_text(), name, render_fragment())
    return found


def main() -> None:
    for name, content in made().items():
        (ROOT / "docs" / name).write_text(content)


if __name__ == "__main__":
    main()
