"""The paper's tables and studies on the user's data, our numbers beside the published ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ood_core.cli.common import (
    extraction_options,
    load_backbone,
    message,
    parse_pairs,
    parse_params,
    print_json,
    print_table,
)
from ood_core.cli.methods import show_found
from ood_core.errors import UsageError, unknown_name
from ood_core.protocols import find_protocol, inspect_protocol
from ood_core.runs import percent

from ood_mofe._published import published_table
from ood_mofe.runner import KS, Bench, Setting, summarise
from ood_mofe.studies import class_figures, extremes, pilot

__all__ = ["STUDIES", "TABLES", "reproduce"]


def _mofe(**options: Any) -> Setting:
    return Setting("mofe", "knn", options)


_NAIVE = {"moe": False, "mixup": False}
_BASELINE = {"baseline": Setting("knn", "knn")}

_METHODS = {
    **{name: Setting("linear_probe", score) for name, score in (("MSP", "msp"), ("MaxLogit", "max_logit"))},
    "Energy": Setting("linear_probe", "energy"),
    "KNN": Setting("knn", "knn"),
    "MOS": Setting("mofe", "mos", _NAIVE | {"group_heads": True}),
    "naive fine-tuning": _mofe(**_NAIVE),
    "MoFE + D-beta Mixup": _mofe(),
}

TABLES: dict[int, dict[str, Setting]] = {
    1: _METHODS,
    2: _METHODS,
    3: {
        **_BASELINE,
        "naive fine-tuning": _mofe(**_NAIVE),
        "+ MoFE": _mofe(mixup=False),
        "+ D-beta": _mofe(moe=False),
        "both": _mofe(),
    },
    4: _BASELINE | {f"{n} experts": _mofe(experts=n) for n in (2, 3, 5, 7, 8, 9)},
    5: {
        **_BASELINE,
        "WordNet": _mofe(mixup=False, grouping="wordnet"),
        "clustering": _mofe(mixup=False, grouping="clustering"),
        "both": _mofe(mixup=False, grouping="both"),
    },
    6: {
        **_BASELINE,
        "without Reg": _mofe(moe=False, reg="none"),
        "without D-beta": _mofe(moe=False, dynamic=False),
        "full": _mofe(moe=False),
    },
}
"""Rows by table, named as the paper names them; "naive fine-tuning" has no published figures."""

STUDIES: dict[str, dict[str, Setting]] = {
    "pilot": {name: _METHODS[name] for name in ("KNN", "MSP", "MaxLogit", "Energy")},
    "layers": {
        "last block": _mofe(),
        "last 2 blocks": _mofe(expert_layers=2),
        "last 3 blocks": _mofe(expert_layers=3),
    },
    "classes": _BASELINE | {"MoFE + D-beta Mixup": _mofe()},
    "router": {
        "normalised class token": _mofe(),
        "raw class token": _mofe(router_norm="none"),
        "mean of patches": _mofe(router_reads="patches"),
        "gate by probability": _mofe(gate="prob"),
        "two experts": _mofe(gate="renorm", top_k=2),
    },
    "reg_on": {
        "before the final norm": _mofe(),
        "behind the final norm": _mofe(reg_on="post_norm"),
        "label smoothing": _mofe(reg="ls"),
        "none": _mofe(reg="none"),
    },
    "scores": {
        name: Setting("mofe", name) for name in ("knn", "knn_global", "msp", "max_logit", "energy", "others", "mos")
    },
    "k": {f"k={k}": Setting("mofe", f"k={k}") for k in KS},
}
"""Rows by study; of "pilot" those among which every backbone has its best."""

_CAVEATS = {
    "k": "These are test figures: a k chosen by them is chosen on the OOD sets that it is judged on.",
    "pilot": "Each backbone's score is that of the highest AUROC: it is chosen on the OOD sets that it is judged on.",
}


def reproduce(args: argparse.Namespace) -> None:
    """Run a table or a study of the paper."""
    _check_study(args)
    overrides = parse_pairs("--set", args.overrides, "NAME=DIR")
    if args.dry_run:
        show_found(args, inspect_protocol(args.protocol, args.root, overrides))
        return
    benches = _benches(args, overrides)
    bench = benches[0]
    message(bench.protocol.describe())
    number = None if args.study else args.table or (2 if args.protocol == "imagenet-100" else 1)
    settings = STUDIES[args.study] if number is None else _settings(number, bench)
    for one in benches:
        for setting in settings.values():
            one.check(setting)
    results = pilot(benches, settings) if args.study == "pilot" else _results(bench, settings)
    if number == 4:
        _add_gains(results)
    if args.study == "classes":
        for name, setting in settings.items():
            results[name]["classes"] = class_figures(bench, setting)
    if args.study in _CAVEATS:
        message(_CAVEATS[args.study])
    _show(args, bench, results, number)


def _check_study(args: argparse.Namespace) -> None:
    if args.study and args.study not in STUDIES:
        raise unknown_name("study", args.study, STUDIES)
    if args.study and args.table:
        raise UsageError(f"Give --table {args.table} or --study {args.study}, not both.")
    if bool(args.backbones) != (args.study == "pilot"):
        raise UsageError("--study pilot compares the backbones of --backbones SPEC [SPEC ...]: give both or neither.")


def _show(args: argparse.Namespace, bench: Bench, results: Mapping[str, Any], number: int | None) -> None:
    """Print the results, beside what was published."""
    published = None if number is None else published_table(number)
    rows = [] if published is None else _of_backbone(published, bench)
    if args.json:
        known = {"protocol": args.protocol, "backbone": args.backbones or bench.backbone.spec}
        known |= {"table": number, "study": args.study}
        notes = bench.protocol.notes + _notes(bench, published)
        print_json(known | {"results": results, "published": rows, "notes": notes})
        return
    for note in _notes(bench, published):
        message(f"Note: {note}")
    _print(results, rows, list(bench.protocol.ood), norms=args.study == "reg_on")
    if args.study == "classes":
        print_table(*extremes(results))
    message(f"Every run: {args.out}")


def _benches(args: argparse.Namespace, overrides: Mapping[str, str]) -> list[Bench]:
    """One, or one per backbone of the pilot study."""
    protocol = find_protocol(args.protocol, args.root, overrides=overrides)
    backbones = [load_backbone(args, spec) for spec in args.backbones or [args.backbone]]
    return [
        Bench(
            protocol,
            backbone,
            Path(args.out),
            params=parse_params(args.param),
            seeds=args.seeds,
            extraction=extraction_options(args),
            convention=args.convention,
            keep=args.keep,
            say=message,
        )
        for backbone in backbones
    ]


def _results(bench: Bench, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Figures by row; a score that no training allows (a k beyond the banks) has none."""
    found = {name: (bench.runs(setting), setting.score) for name, setting in settings.items()}
    return {
        name: summarise(runs, score) for name, (runs, score) in found.items() if score in {run["score"] for run in runs}
    }


def _settings(number: int, bench: Bench) -> dict[str, Setting]:
    """A table's rows; with a text tower also what the paper has for CLIP, whose method is judged by CLIPN's score."""
    if number > 2 or "text" not in bench.backbone.capabilities:
        return TABLES[number]
    score = "atd" if bench.params.get("texts") else "others"
    own = {"MoFE + D-beta Mixup": Setting("mofe", score), "MoFE + D-beta Mixup, knn": _mofe()}
    return {"MCM": Setting("mcm", "mcm")} | TABLES[number] | own


def _add_gains(results: dict[str, Any]) -> None:
    """Table 4: by how much the average FPR95 is below the baseline's."""
    baseline = results["baseline"]["average"]["fpr95"]["mean"]
    for row in results.values():
        found = row["average"]["fpr95"]
        row["gain"] = {"mean": baseline - found["mean"], "std": found["std"]}


def _of_backbone(published: Mapping[str, Any], bench: Bench) -> list[dict[str, Any]]:
    """Rows of CLIP for a backbone with a text tower, of DINOv2 for others; the ablations are of DINOv2."""
    kind = "CLIP" if "text" in bench.backbone.capabilities else "DINOv2"
    rows = [{"backbone": published.get("backbone"), **row} for row in published["rows"]]
    return [row for row in rows if row["backbone"] in (kind, published.get("backbone"))]


def _notes(bench: Bench, published: Mapping[str, Any] | None) -> list[str]:
    if published is None:
        return []
    if published["id"] == bench.protocol.title:
        return [published["note"]]
    return [published["note"], f"The published rows are of {published['id']}, ours of {bench.protocol.title}."]


# ---- to print


def _print(
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], sets: list[str], *, norms: bool = False
) -> None:
    """Ours, each followed by the published rows of its name, then other methods."""
    lines = []
    for name, row in results.items():
        lines.append([name, *_ours(row, sets), _norm(row) if norms else ""])
        lines += [_theirs(other, sets) for other in rows if other["method"] == name]
    lines += [_theirs(other, sets) for other in rows if other["method"] not in results]
    header = ["FPR95 / AUROC", *sets, "average", "accuracy", "gain", "token norm"]
    # A column that says nothing in this table is left out.
    keep = [place for place in range(len(header)) if any(line[place] for line in lines)]
    print_table([header[place] for place in keep], [[line[place] for place in keep] for line in lines])


def _ours(row: Mapping[str, Any], sets: list[str]) -> list[str]:
    cells = [" / ".join(map(percent, figures.values())) for figures in (*map(row["sets"].get, sets), row["average"])]
    return [*cells, percent(row["accuracy"]), percent(row.get("gain"))]


def _norm(row: Mapping[str, Any]) -> str:
    """Mean norm of the class token before the final norm, after the last epoch."""
    norms = [epoch["token_norm"] for epoch in row["last_epoch"] if "token_norm" in epoch]
    return f"{fmean(norms):.1f}" if norms else ""


def _theirs(row: Mapping[str, Any], sets: list[str]) -> list[str]:
    figures = [row.get("sets", {}).get(name) for name in sets] + [row.get("average")]
    cells = ["" if f is None else f"{f['fpr95']:.2f} / {f['auroc']:.2f}" for f in figures]
    last = [f"{row[name]:.2f}" if name in row else "" for name in ("accuracy", "gain")]
    return [f"published on {row['backbone']}: {row['method']}", *cells, *last, ""]
