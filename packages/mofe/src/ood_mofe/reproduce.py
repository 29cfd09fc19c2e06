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
from ood_core.errors import UsageError, unknown_name
from ood_core.pictures.plots import new_figure
from ood_core.protocols import find_protocol, inspect_protocol, summarise_protocol
from ood_core.reproduction import tables
from ood_core.reproduction.command import print_differences, show_found
from ood_core.reproduction.studies import study_options
from ood_core.reproduction.tables import Beside, beside, figure_cell, percent

from ood_mofe.plot import draw_classes
from ood_mofe.runner import KS, Bench, Setting, summarise
from ood_mofe.studies import class_figures, every_class, extremes, fine_grained, fine_labels, pilot

__all__ = ["STUDIES", "TABLES", "published_table", "reproduce"]


_ELSEWHERE = {
    "seed": "give --seeds",
    "scorer": "every score is computed, and --study scores shows them",
    "bank": "both banks are judged, and --study scores shows them",
}


def _mofe(**options: Any) -> Setting:
    return Setting("mofe", "knn", options)


# Heads that are learned, with CLIP, too: its experts' are the classes' texts otherwise.
_NAIVE = {"moe": False, "mixup": False, "classifier": "linear"}
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
    "fine_grained": {"KNN": _METHODS["KNN"]},
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
"""Rows by study; of "pilot" and "fine_grained" those of every backbone."""

_OF_BACKBONES = ("pilot", "fine_grained")
_PROTOCOLS = {"pilot": ["imagenet-1k", "imagenet-o"]}
_CAVEATS = {
    "k": "These are test figures: a k chosen by them is chosen on the OOD sets that it is judged on.",
    "pilot": "The paper judges backbones by KNN; the other scores are shown besides.",
    "fine_grained": "The text that this follows does not name the 11 classes of the paper's Fig. 3: without "
    "--fine-classes they are those of the smallest family of WordNet that has as many.",
}


def published_table(number: int) -> dict[str, Any]:
    """A table of the paper: where it comes from, its ID set, what to know of it, and its rows.

    Figures are in percent. Rows have a `method` and its `average` over the OOD sets (`fpr95` and `auroc`); those of
    Tables 1 and 2 also a `backbone`, the figures of all `sets` and the `accuracy`, and `inconsistent_averages` lists
    those that follow from their columns neither rounded nor cut off. Table 4 has the `gain` in average FPR95 only.

    Args:
        number: 1 and 2 the paper's methods on ImageNet-1k and ImageNet-100, 3 the method's parts, 4 number of experts,
            5 grouping of the classes, 6 parts of the mixup.

    Raises:
        UsageError: another number.

    Example:
        >>> published_table(3)["rows"][-1]
        {'method': 'both', 'average': {'fpr95': 17.01, 'auroc': 95.89}}
    """
    return tables.published_table("ood_mofe", number)


def reproduce(args: argparse.Namespace) -> None:
    """Run a table or a study of the paper."""
    _check_study(args)
    overrides = parse_pairs("--set", args.overrides, "NAME=DIR")
    places = _by_protocol([args.protocol] if args.protocol else _PROTOCOLS.get(args.study, ["imagenet-1k"]), overrides)
    if args.dry_run:
        rows = [row for name, own in places.items() for row in inspect_protocol(name, args.root, own)]
        show_found(args, list({row.name: row for row in rows}.values()))
        return
    benches = _benches(args, places)
    bench = benches[0]
    for protocol in {one.protocol.name: one.protocol for one in benches}.values():
        message(protocol.describe())
    number = None if args.study else args.table or (2 if bench.protocol.name == "imagenet-100" else 1)
    settings = STUDIES[args.study] if number is None else _settings(number, bench)
    for one in benches:
        for setting in settings.values():
            one.check(setting)
    said = _said(args, bench, settings, number)
    zero_shot, sentence = bench.zero_shot()
    said += [sentence] if sentence else []
    results = _of_study(args, benches, settings) if args.study else _results(bench, settings)
    if number == 4:
        _add_gains(results)
    _show(args, benches, results, number, said, zero_shot)


def _check_study(args: argparse.Namespace) -> None:
    if args.study and args.study not in STUDIES:
        raise unknown_name("study", args.study, STUDIES)
    if args.study and args.table:
        raise UsageError(f"Give --table {args.table} or --study {args.study}, not both.")
    if bool(args.backbones) != (args.study in _OF_BACKBONES):
        raise UsageError(
            f"--study {' and --study '.join(_OF_BACKBONES)} compare the backbones of --backbones SPEC [SPEC ...]: give "
            "both or neither."
        )
    if (args.fine_classes or args.plot) and args.study != "fine_grained":
        raise UsageError("--fine-classes and --plot belong to --study fine_grained.")
    if args.plot:
        new_figure(args.plot, "ood-mofe")  # to refuse what cannot be drawn at once
    for option, instead in _ELSEWHERE.items():
        if option in parse_params(args.param):
            raise UsageError(f"--param {option}= changes no row of a table: {instead}.")


def _by_protocol(names: Sequence[str], overrides: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Each protocol's own overrides, and those that none has, which are refused where they are looked up."""
    if len(names) == 1:
        return {names[0]: dict(overrides)}
    splits = {"train", "calibration", "test", "class_list"}
    known = {name: splits | set(summarise_protocol(name)["sets"]) for name in names}
    strange = set(overrides) - set.union(*known.values())
    return {name: {key: overrides[key] for key in overrides if key in own | strange} for name, own in known.items()}


def _of_study(
    args: argparse.Namespace, benches: Sequence[Bench], settings: Mapping[str, Setting]
) -> dict[str, dict[str, Any]]:
    bench = benches[0]
    if args.study == "pilot":
        return pilot(benches, settings)
    if args.study == "fine_grained":
        labels = fine_labels(bench.protocol, args.fine_classes)
        results = fine_grained(benches, settings["KNN"], labels)
        if args.plot:
            draw_classes({name: row["classes"] for name, row in results.items()}, args.plot)
            message(f"Picture: {args.plot}")
        return results
    results = _results(bench, settings)
    if args.study == "classes":
        for name, setting in settings.items():
            results[name]["classes"] = class_figures(bench, setting)
    return results


def _said(args: argparse.Namespace, bench: Bench, settings: Mapping[str, Setting], number: int | None) -> list[str]:
    """What a reader of the figures has to know.

    Raises:
        UsageError: an option given with --param that all rows set themselves.
    """
    said = [] if number is None else _notes(bench, published_table(number))
    said.append(f"FPR95 of all rows is by the rule {bench.convention!r}; the paper does not state its own.")
    said += [_CAVEATS[args.study]] if args.study in _CAVEATS else []
    rows = {name: setting.options for name, setting in settings.items() if setting.detector == "mofe"}
    if args.study == "k":
        rows = {name: {"k": int(name.removeprefix("k="))} for name in rows}
    if rows:
        study_options(rows, bench.params, said.append)
        return said + bench.notes
    return said + ["--param is of MoFE, which none of these rows trains."] * bool(bench.params)


def _show(
    args: argparse.Namespace,
    benches: Sequence[Bench],
    results: Mapping[str, Any],
    number: int | None,
    said: Sequence[str],
    zero_shot: Mapping[str, Any],
) -> None:
    """Print the results, beside what was published."""
    bench, protocols = benches[0], {one.protocol.name: one.protocol for one in benches}
    rows = [] if number is None else _of_backbone(published_table(number), bench)
    comparable = rows if number and published_table(number)["id"] == bench.protocol.title else []
    if args.json:
        names = list(protocols)
        known = {"protocol": names if len(names) > 1 else names[0], "backbone": args.backbones or bench.backbone.spec}
        known |= {"table": number, "study": args.study, "convention": bench.convention}
        known |= {"zero_shot_accuracy": zero_shot}
        notes = [note for protocol in protocols.values() for note in protocol.notes] + list(said)
        compared = [one.to_dict() for one in _compared(results, comparable)]
        print_json(known | {"results": results, "published": rows, "differences": compared, "notes": notes})
        return
    for note in said:
        message(f"Note: {note}")
    head = f"FPR95 ({bench.convention}) / AUROC"
    for name, protocol in protocols.items():
        own = {label: row for label, row in results.items() if row.get("protocol", name) == name}
        _print(own, rows, list(protocol.ood), head, norms=args.study == "reg_on")
        print_differences(
            _compared(own, comparable), [*protocol.ood, *_AVERAGES], ["fpr95", "auroc", "accuracy", "gain"]
        )
    if args.study == "classes":
        print_table(*extremes(results, head))
    if args.study == "fine_grained":
        print_table(*every_class(results, head))
    message(f"Every run: {args.out}")


def _benches(args: argparse.Namespace, places: Mapping[str, Mapping[str, str]]) -> list[Bench]:
    """One, or for the studies of backbones one per protocol and backbone."""
    protocols = [find_protocol(name, args.root, overrides=own) for name, own in places.items()]
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
        for protocol in protocols
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
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], sets: list[str], head: str, *, norms: bool = False
) -> None:
    """Ours, each followed by the published rows of its name, then other methods."""
    lines = []
    for name, row in results.items():
        lines.append([name, *_ours(row, sets), _norm(row) if norms else ""])
        lines += [_theirs(other, sets) for other in rows if other["method"] == name]
    lines += [_theirs(other, sets) for other in rows if other["method"] not in results]
    header = [head, *sets, "average", "accuracy", "gain", "token norm"]
    # A column that says nothing in this table is left out.
    keep = [place for place in range(len(header)) if any(line[place] for line in lines)]
    print_table([header[place] for place in keep], [[line[place] for place in keep] for line in lines])


_AVERAGES = ("average", "accuracy", "gain")


def _compared(results: Mapping[str, Any], published: Sequence[Mapping[str, Any]]) -> list[Beside]:
    """Our rows beside the published ones of the same name."""
    found = []
    for row in published:
        if row["method"] in results:
            ours = results[row["method"]]
            figures = ours["sets"] | {"average": ours["average"]}
            figures |= {name: {name: ours[name]} for name in _AVERAGES[1:] if ours.get(name)}
            theirs = row.get("sets", {}) | {"average": row.get("average", {})}
            theirs |= {name: {name: row[name]} for name in _AVERAGES[1:] if name in row}
            found += beside(row["method"], {one: _means(values) for one, values in figures.items()}, theirs)
    return found


def _means(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {measure: 100 * value["mean"] for measure, value in figures.items() if value is not None}


def _ours(row: Mapping[str, Any], sets: list[str]) -> list[str]:
    cells = [" / ".join(map(percent, figures.values())) for figures in (*map(row["sets"].get, sets), row["average"])]
    return [*cells, percent(row["accuracy"]), percent(row.get("gain"))]


def _norm(row: Mapping[str, Any]) -> str:
    """Mean norm of the class token before the final norm, after the last epoch."""
    norms = [epoch["token_norm"] for epoch in row["last_epoch"] if "token_norm" in epoch]
    return f"{fmean(norms):.1f}" if norms else ""


def _theirs(row: Mapping[str, Any], sets: list[str]) -> list[str]:
    figures = [row.get("sets", {}).get(name) for name in sets] + [row.get("average")]
    last = [f"{row[name]:.2f}" if name in row else "" for name in ("accuracy", "gain")]
    return [f"published on {row['backbone']}: {row['method']}", *map(figure_cell, figures), *last, ""]
