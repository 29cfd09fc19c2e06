"""The paper's protocols and studies on the user's data, our numbers beside the published ones."""

from __future__ import annotations

import argparse
import re
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any, NamedTuple

from ood_core.backbones.base import Backbone
from ood_core.cli.common import (
    extraction_options,
    load_backbone,
    message,
    named_sources,
    parse_pairs,
    parse_params,
    print_json,
    print_table,
)
from ood_core.detectors.zero_shot import default_k
from ood_core.errors import MissingDataError, UsageError, unknown_name
from ood_core.files import write_json
from ood_core.prompts import read_class_names
from ood_core.protocols import Protocol, find_protocol, inspect_protocol
from ood_core.reproduction.command import print_differences, show_found
from ood_core.reproduction.published import zero_shot_beside
from ood_core.reproduction.studies import study_options
from ood_core.reproduction.tables import Beside, beside, figure_cell, published_table

from ood_iim.detectors import IIM
from ood_iim.plot import draw_prototypes
from ood_iim.prototypes import imagenet_halves, prototypes
from ood_iim.studies import STUDIES, Sets, summarise, swept_trial, trial, within_grid

__all__ = ["reproduce"]

_CONVENTION = "released"
"""The rule of FPR95 behind the published numbers, for all that is printed here."""

_MEASURES = ("auroc", "fpr95")


class _Row(NamedTuple):
    """What a setting has given: all scores, the one that counts, and what a study shows besides."""

    name: str
    score: str
    figures: dict[str, Any]
    extra: list[dict[str, Any]]


def reproduce(args: argparse.Namespace) -> None:
    """Run a protocol or a study of the paper."""
    if args.study and args.study not in (*STUDIES, "prototypes"):
        raise unknown_name("study", args.study, [*STUDIES, "prototypes"])
    if args.study == "prototypes":
        _reproduce_prototypes(args)
        return
    if not args.root:
        raise UsageError("Give --root DIR, the folder with the data sets.")
    overrides = parse_pairs("--set", args.overrides, "NAME=DIR")
    if args.dry_run:
        show_found(args, inspect_protocol(args.protocol, args.root, overrides))
        return
    protocol = find_protocol(args.protocol, args.root, overrides=overrides, class_names_file=args.classes)
    message(protocol.describe())
    sets, backbone = _sets(args, protocol), load_backbone(args)
    settings = _settings(args, backbone)
    args.cache = _trial_cache(args, sets, backbone)
    extraction = extraction_options(args) | {"needs": {"image", "local"}}
    zero_shot = zero_shot_beside(backbone, protocol.test, protocol.class_names, args.template, **extraction)
    rows = [
        _row(args, sets, backbone, shots, label, options) for shots in args.shots for label, options in settings.items()
    ]
    _show(args, protocol, rows, zero_shot)


def _sets(args: argparse.Namespace, protocol: Protocol) -> Sets:
    if protocol.train is None:
        raise MissingDataError(f"{args.protocol} has no training images below {args.root}: IIM learns from some.")
    return Sets(protocol.train, protocol.test, protocol.ood, protocol.class_names)


def _row(
    args: argparse.Namespace, sets: Sets, backbone: Backbone, shots: int, label: str, options: dict[str, Any]
) -> _Row:
    """Train and judge a setting; without negatives in the score the paper calls it IIM*."""
    name = _name(shots, label)
    figures = _trials(args, sets, backbone, shots, name, options)
    negatives = options.get("negatives", "use")
    extra = _beyond_scores(args, sets, backbone, name, label, negatives)
    return _Row(name, "s_mcm" if negatives == "use" else "s_mcm*", figures, extra)


def _name(shots: int, label: str) -> str:
    return f"{shots} shots{f', {label}' if label else ''}"


def _show(
    args: argparse.Namespace, protocol: Protocol, rows: list[_Row], zero_shot: tuple[dict[str, Any], str]
) -> None:
    published = _published(args.study, protocol.title, args.shots)
    results, main = {row.name: row.figures for row in rows}, {row.name: row.score for row in rows}
    compared = _compared(args.study, results, main, published)
    known, sentence = zero_shot
    if args.json:
        given = {"protocol": args.protocol, "convention": _CONVENTION, "zero_shot_accuracy": known}
        given |= {"results": results, "study": {row.name: row.extra for row in rows}, "published": published}
        print_json(given | {"differences": [one.to_dict() for one in compared]})
        return
    _print_tables(args, rows, list(protocol.ood), published)
    print_differences(compared, [*protocol.ood, "average"], ["fpr95", "auroc"])
    if sentence:
        message(sentence)
    message(f"Every run: {args.out}")


def _settings(args: argparse.Namespace, backbone: Any) -> dict[str, dict[str, Any]]:
    """Label -> options of IIM: the protocol's preset, then what was given, then what a study varies."""
    rows = study_options(STUDIES[args.study] if args.study else {"": {}}, parse_params(args.param), message)
    rows = {label: _preset(args.protocol) | options for label, options in rows.items()}
    for options in rows.values():
        IIM().set_params(**options)  # a mistake shows here, not after a training
    return within_grid(rows, prod(backbone.grid or ())) if args.study == "k" else rows


def _trial_cache(args: argparse.Namespace, sets: Any, backbone: Any) -> str | None:
    """The folder of test features, so that every trial after the first only trains; None where the disk is too full."""
    if args.no_cache:
        return None
    if args.cache:
        return str(args.cache)
    folder = Path(args.out) / "features"
    folder.mkdir(parents=True, exist_ok=True)
    count = sum(map(len, (sets.test, *sets.ood.values())))
    size = count * (prod(backbone.grid or ()) + 1) * backbone.width * 4
    if size > disk_usage(folder).free / 2:
        message(f"Test features would take {_gigabytes(size)} of {folder}, too much for its disk: every trial encodes.")
        return None
    message(f"Test features are kept in {folder} ({_gigabytes(size)}); --cache DIR: elsewhere, --no-cache: nowhere.")
    return str(folder)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _beyond_scores(
    args: argparse.Namespace, sets: Any, backbone: Any, name: str, label: str, negatives: str
) -> list[dict[str, Any]]:
    """What a study shows besides the table of scores, on the first seed: test k, or alpha."""
    if args.study not in ("k", "weights"):
        return []
    folder = _run_folder(args, name, args.seeds[0])
    choices: dict[str, Any] = {}
    if args.study == "weights":
        alphas = [0.0, 0.5, 1.0, 1.5] if label == "C_n=300" else [1.0]
        choices = {"ks": [_own_k(IIM.from_pretrained(folder / "detector"), backbone)], "alphas": alphas}
    rows = swept_trial(sets, backbone, folder, **choices, **extraction_options(args))
    return [
        {key: row[key] for key in ("k", "alpha", "auroc", "fpr95")} for row in rows if row["negatives"] == negatives
    ]


def _own_k(detector: IIM, backbone: Any) -> int:
    return default_k(detector.scoring.k, prod(backbone.grid))


def _reproduce_prototypes(args: argparse.Namespace) -> None:
    """Fig. 3: numbers, and a picture where matplotlib is installed."""
    given = {name: read_class_names(file) for name, file in named_sources(args.lists).items()}
    found = prototypes(load_backbone(args), given or imagenet_halves(), template=args.template)
    folder = Path(args.out) / "prototypes"
    write_json(folder / "prototypes.json", found)
    try:
        draw_prototypes(found, folder / "prototypes.png")
        message(f"Picture: {folder / 'prototypes.png'}")
    except UsageError as error:
        message(str(error))
    if args.json:
        print_json(found)
    else:
        print_table(
            ["cosine of pairs", "classes", "mean", "std", *(f"{float(q):.0%}" for q in _quantiles(found))],
            [
                [name, one["classes"], *(f"{v:.4f}" for v in (one["mean"], one["std"], *one["quantiles"].values()))]
                for name, one in found.items()
            ],
        )
    message(f"All numbers: {folder / 'prototypes.json'}")


def _quantiles(found: dict[str, Any]) -> list[str]:
    return list(next(iter(found.values()))["quantiles"])


def _run_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(args.out) / args.protocol / re.sub(r"[^A-Za-z0-9_=.+-]+", "-", name) / f"seed-{seed}"


def _trials(
    args: argparse.Namespace, sets: Any, backbone: Any, shots: int, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """The seeds of one setting, averaged."""
    runs = []
    for seed in args.seeds:
        folder = _run_folder(args, name, seed)
        message(f"{name}, seed {seed}: {folder}")
        runs.append(
            trial(
                sets,
                backbone,
                shots=shots,
                seed=seed,
                folder=folder,
                options=options,
                convention=_CONVENTION,
                template=args.template,
                **extraction_options(args),
            )
        )
    return summarise(runs)


def _preset(protocol: str) -> dict[str, Any]:
    """Crop scale, and negatives left out of the score where the classes are few (the paper's IIM*)."""
    return {"crop_scale": 0.65, "negatives": "ignore"} if protocol == "imagenet-100" else {}


def _published(study: str | None, title: str, shots: list[int]) -> list[dict[str, Any]]:
    """The paper's rows for this ID set: Table 1 without training and with as many shots, or Table 2 for the losses."""
    if study is None:
        rows = published_table("ood_iim", 1)["rows"]
        return [row for row in rows if row["id"] == title and row["shots"] in (0, *shots)]
    table = published_table("ood_iim", 2)
    if study != "losses" or table["id"] != title or table["shots"] not in shots:
        return []
    averages = [{"average": {m: row[m] for m in _MEASURES}} | row for row in table["rows"]]
    return [{"shots": table["shots"], "method": row["variant"], "ood": {}, **row} for row in averages]


def _print_tables(args: argparse.Namespace, rows: list[_Row], sets: list[str], published: list[dict[str, Any]]) -> None:
    """All scores, or the main one of every row of a study, beside the published ones; then what a study adds."""
    whole = args.study in (None, "scores")
    print_table(
        [f"FPR95 / AUROC (rule of FPR95: {_CONVENTION})", *sets, "average", "accuracy"],
        [
            _our_row(row.name, score, row.figures[score], sets)
            for row in rows
            for score in (row.figures if whole else [row.score])
        ]
        + [[f"published: {row['shots']} shots, {row['method']}", *_cells(row, sets), ""] for row in published],
    )
    for row in rows:
        if row.extra:
            message(f"{row.name}, {row.score}, seed {args.seeds[0]}")
            print_table(
                ["k", "alpha", "AUROC", f"FPR95 ({_CONVENTION})"],
                [[line["k"], line["alpha"], *(_percent(line[m]) for m in _MEASURES)] for line in row.extra],
            )


def _compared(
    study: str | None, results: dict[str, Any], main: dict[str, str], published: list[dict[str, Any]]
) -> list[Beside]:
    """The main score of every row beside the published row of the same training."""
    # The paper's rows are the study's, in its order; in the main table other methods stand beside IIM.
    pairs = zip(STUDIES[study], published, strict=False) if study else (("", row) for row in published if _is_iim(row))
    found = []
    for label, row in pairs:
        name = _name(row["shots"], label)
        figures = results[name][main[name]]
        ours = {one: {m: 100 * figures[one][m][0] for m in _MEASURES} for one in figures if one != "accuracy"}
        found += beside(name, ours, {**row["ood"], "average": row["average"]})
    return found


def _is_iim(row: dict[str, Any]) -> bool:
    return row["method"] in ("IIM", "IIM*")


def _our_row(name: str, score: str, figures: dict[str, Any], sets: list[str]) -> list[str]:
    cells = [" / ".join(f"{100 * figures[one][m][0]:.2f}" for m in ("fpr95", "auroc")) for one in (*sets, "average")]
    accuracy = figures.get("accuracy")
    return [f"{name}: {score}", *cells, "" if accuracy is None else _percent(accuracy[0])]


def _cells(row: dict[str, Any], sets: list[str]) -> list[str]:
    """FPR95 / AUROC of a published row, in percent there already."""
    return [*map(figure_cell, (*map(row["ood"].get, sets), row["average"]))]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
