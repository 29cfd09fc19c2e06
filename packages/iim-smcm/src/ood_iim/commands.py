"""What the verbs of `ood-iim` do."""

from __future__ import annotations

import argparse
import json
import re
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.cli import commands as core
from ood_core.cli.common import (
    extraction_options,
    given_class_names,
    load_backbone,
    message,
    named_sources,
    open_given,
    parse_pairs,
    parse_params,
    print_json,
    print_table,
)
from ood_core.cli.methods import (
    evaluate_variants,
    explain_image,
    fit_detector,
    new_detector,
    saved_detector,
    show_found,
)
from ood_core.errors import MissingDataError, UsageError, unknown_name

if TYPE_CHECKING:
    from ood_iim.detectors import IIM

score = core.score


def fit(args: argparse.Namespace) -> None:
    """Learn prompts, calibrate if asked, save."""
    from ood_core.data import FewShot

    source: Any = open_given(args, args.source)
    names = given_class_names(args) or list(source.label_names)
    detector = new_detector(args, "iim", names, seed=args.seed)
    if args.shots:
        source = FewShot(source, args.shots, args.seed)
        if source.short_classes:
            message(f"Fewer than {args.shots} images, all taken: {_listed(source.short_classes)}")
    message(f"Learning {len(names)} class prompts and {detector.negative_prompts} negatives from {len(source)} images")
    fit_detector(args, detector, source, cache=args.cache)


def evaluate(args: argparse.Namespace) -> None:
    """Judge the six scores of a trained detector."""
    evaluate_variants(args, _saved_detector(args).variants(), "s_mcm")


def explain(args: argparse.Namespace) -> None:
    """Draw one image with the patches that mattered."""
    from ood_iim.explain import explain as look

    explain_image(args, partial(look, _saved_detector(args)), "iim")


def sweep(args: argparse.Namespace) -> None:
    """Judge combinations of k, alpha, temperature and negatives."""
    from ood_iim.studies import sweep as run

    tests = {name: open_given(args, source) for name, source in named_sources(args.ood).items()}
    if not tests and not args.validation:
        raise UsageError("Give OOD test sets (--ood NAME=SOURCE), or OOD images to choose by (--validation SOURCE).")
    validation = {"validation": open_given(args, args.validation)} if args.validation else {}
    rows = run(
        _saved_detector(args),
        id=open_given(args, args.id),
        ood=validation | tests,
        ks=args.k,
        alphas=args.alpha,
        temperatures=args.temperature,
        **extraction_options(args),
    )
    if validation:
        rows = [_chosen_by_validation(rows)]
        message("Chosen by the AUROC on the validation images; the figures are of the test sets.")
    else:
        message("These are test figures: to choose by OOD images, declare some with --validation.")
    if args.json:
        print_json(rows)
        return
    print_table(
        ["k", "alpha", "T", "negatives", "AUROC", "FPR95"],
        [
            [row["k"], row["alpha"], row["temperature"], row["negatives"], *(_percent(row[m]) for m in _MEASURES)]
            for row in rows
        ],
    )


def _chosen_by_validation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the best validation AUROC, its averages over the test sets alone."""
    from statistics import fmean

    best = max(rows, key=lambda row: row["per_set"]["validation"]["auroc"])
    tests = {name: figures for name, figures in best["per_set"].items() if name != "validation"}
    averages = {m: fmean(figures[m] for figures in tests.values()) if tests else None for m in _MEASURES}
    return best | averages | {"per_set": tests, "validation": best["per_set"]["validation"]}


def import_released(args: argparse.Namespace) -> None:
    """Turn a checkpoint of the released code into a saved detector."""
    from ood_iim.detectors import IIM

    names = given_class_names(args) or []
    detector = IIM.from_released(args.checkpoint, backbone=load_backbone(args), class_names=names)
    detector.save_pretrained(args.out)
    message(f"{len(names)} classes, {detector.negative_prompts} negative prompts. Saved: {args.out}")


def reproduce(args: argparse.Namespace) -> None:
    """Run a protocol or a study of the paper, our numbers beside the published ones."""
    from ood_core.protocols import find_protocol, inspect_protocol

    from ood_iim.studies import STUDIES, Sets

    overrides = parse_pairs("--set", args.overrides, "NAME=DIR")
    if args.study and args.study not in STUDIES:
        raise unknown_name("study", args.study, STUDIES)
    if args.dry_run:
        show_found(args, inspect_protocol(args.protocol, args.root, overrides))
        return
    found = find_protocol(args.protocol, args.root, overrides=overrides, class_names_file=args.classes)
    message(found.describe())
    if found.train is None:
        raise MissingDataError(f"{args.protocol} has no training images below {args.root}: IIM learns from some.")
    sets = Sets(found.train, found.test, found.ood, found.class_names)
    backbone = load_backbone(args)
    given = parse_params(args.param)
    settings = STUDIES[args.study] if args.study else {"": _preset(args.protocol)}
    results: dict[str, Any] = {}
    for shots in args.shots:
        for label, options in settings.items():
            name = f"{shots} shots{f', {label}' if label else ''}"
            results[name] = _trials(args, sets, backbone, shots, name, options | given)
    published = _published(args.study, found.title, args.shots)
    extra = {name: _beyond_scores(args, sets, backbone, name) for name in results}
    if args.json:
        print_json({"protocol": args.protocol, "results": results, "study": extra, "published": published})
        return
    print_table(
        ["FPR95 / AUROC", *found.ood, "average", "accuracy"],
        [row for name, scores in results.items() for row in _our_rows(name, scores, list(found.ood), args)]
        + [
            [f"published: {row['shots']} shots, {row['method']}", *_cells(row, list(found.ood)), ""]
            for row in published
        ],
    )
    for name, lines in extra.items():
        if lines:
            message(name)
            print_table(
                list(lines[0]), [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in lines]
            )
    message(f"Every run: {args.out}")


def _beyond_scores(args: argparse.Namespace, sets: Any, backbone: Any, name: str) -> list[dict[str, Any]]:
    """What a study shows besides the table of scores, on the first seed: test k, alpha, or prototypes."""
    from ood_core.data import FewShot
    from ood_core.features import extract

    from ood_iim.detectors import IIM
    from ood_iim.studies import local_map, prototypes, sweep

    folder = _run_folder(args, name, args.seeds[0])
    options = extraction_options(args)
    if args.study not in ("k", "weights", "prototypes"):
        return []
    detector = IIM.from_pretrained(folder / "detector", backbone=backbone)
    if args.study == "prototypes":
        few = extract(backbone, FewShot(sets.train, min(args.shots), args.seeds[0]), detector.needs, **options)
        _keep_local_map(local_map(detector, few), folder)
        return [prototypes(detector)]
    if args.study == "weights":
        alphas = [0.0, 0.5, 1.0, 1.5] if name.endswith("C_n=300") else [1.0]
        rows = sweep(detector, id=sets.test, ood=sets.ood, ks=[_own_k(detector, backbone)], alphas=alphas, **options)
    else:
        rows = sweep(detector, id=sets.test, ood=sets.ood, alphas=[1.0], **options)
    return [{key: row[key] for key in ("k", "alpha", "auroc", "fpr95")} for row in rows if row["negatives"] == "use"]


def _keep_local_map(rows: list[dict[str, Any]], folder: Path) -> None:
    """The patches as numbers, and as a picture where matplotlib is installed."""
    from ood_core._files import write_json

    from ood_iim.plot import draw_local_map

    write_json(folder / "local_map.json", rows)
    message(f"Patches in two dimensions: {folder / 'local_map.json'}")
    try:
        draw_local_map(rows, folder / "local_map.png")
        message(f"Picture: {folder / 'local_map.png'}")
    except UsageError as error:
        message(str(error))


def _own_k(detector: IIM, backbone: Any) -> int:
    from math import prod

    from ood_core.detectors.zero_shot import default_k

    return default_k(detector.k, prod(backbone.grid))


def _run_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(args.out) / args.protocol / re.sub(r"[^A-Za-z0-9_=.+-]+", "-", name) / f"seed-{seed}"


def _trials(
    args: argparse.Namespace, sets: Any, backbone: Any, shots: int, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """The seeds of one setting, averaged; FPR95 by the released rule, which the published numbers follow."""
    from ood_iim.studies import summarise, trial

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
                convention="released",
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
    if study not in (None, "losses"):
        return []
    file = "table2.json" if study else "table1.json"
    table = json.loads((resources.files("ood_iim") / "published" / file).read_text(encoding="utf-8"))
    if study:
        if table["id"] != title or table["shots"] not in shots:
            return []
        averages = [{"average": {m: row[m] for m in _MEASURES}} | row for row in table["rows"]]
        return [{"shots": table["shots"], "method": row["variant"], "ood": {}, **row} for row in averages]
    return [row for row in table["rows"] if row["id"] == title and row["shots"] in (0, *shots)]


def _our_rows(name: str, scores: dict[str, Any], sets: list[str], args: argparse.Namespace) -> list[list[str]]:
    chosen = scores if args.study == "scores" or not args.study else {"s_mcm": scores["s_mcm"]}
    rows = []
    for score_name, figures in chosen.items():
        cells = [
            " / ".join(f"{100 * figures[one][m][0]:.2f}" for m in ("fpr95", "auroc")) for one in (*sets, "average")
        ]
        accuracy = figures.get("accuracy")
        rows.append([f"{name}: {score_name}", *cells, "" if accuracy is None else _percent(accuracy[0])])
    return rows


def _cells(row: dict[str, Any], sets: list[str]) -> list[str]:
    """FPR95 / AUROC of a published row, in percent there already."""
    figures = [row["ood"].get(name) for name in sets] + [row["average"]]
    return ["" if f is None else f"{f['fpr95']:.2f} / {f['auroc']:.2f}" for f in figures]


_MEASURES = ("auroc", "fpr95")


def _saved_detector(args: argparse.Namespace) -> IIM:
    from ood_iim.detectors import IIM

    made: IIM = saved_detector(args, IIM)
    return made


def _listed(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:5])
    return shown + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
