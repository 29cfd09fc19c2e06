"""What the verbs of `ood-iim` do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.cli import commands as core
from ood_core.cli.common import (
    extraction_options,
    load_backbone,
    message,
    named_sources,
    parse_param,
    print_json,
)
from ood_core.errors import MissingDataError, UsageError, unknown_name

if TYPE_CHECKING:
    from ood_iim.detectors import IIM

score = core.score


def fit(args: argparse.Namespace) -> None:
    """Learn prompts, calibrate if asked, save."""
    from ood_core.data import FewShot, open_source
    from ood_core.prompts import read_class_names

    source = open_source(args.source)
    names = read_class_names(args.classes) if args.classes else list(source.label_names)
    detector = _new_detector(args, names, seed=args.seed)
    if args.shots:
        source = FewShot(source, args.shots, args.seed)
        if source.short_classes:
            message(f"Fewer than {args.shots} images, all taken: {_listed(source.short_classes)}")
    message(f"Learning {len(names)} class prompts and {detector.negative_prompts} negatives from {len(source)} images")
    checkpoint = Path(args.out) / "checkpoint.safetensors"
    detector.fit(source, checkpoint=checkpoint, cache=args.cache)
    if args.calibrate:
        detector.calibrate(detector.score(args.calibrate, **extraction_options(args)), args.tpr)
    if os.environ.get("RANK", "0") != "0":  # every process has the same result: one writes it
        return
    detector.save_pretrained(args.out)
    checkpoint.unlink(missing_ok=True)
    last = detector.history[-1]
    message("Last epoch: " + ", ".join(f"{name} {value:.4g}" for name, value in last.items()))
    if detector.threshold is not None:
        message(f"Scores below {detector.threshold:.9g} are OOD")
    message(f"Saved: {args.out}")
    if args.json:
        print_json({"detector": args.out, "history": detector.history, "threshold": detector.threshold})


def evaluate(args: argparse.Namespace) -> None:
    """Judge the six scores of a trained detector."""
    from ood_core.data import open_source
    from ood_core.evaluation import evaluate as run

    detector = _saved_detector(args)
    found = run(
        detector.variants(),
        id=open_source(args.id),
        ood={name: open_source(source) for name, source in named_sources(args.ood).items()},
        calibrate=open_source(args.calibrate) if args.calibrate else None,
        convention=args.convention,
        bootstrap=args.bootstrap,
        seed=args.seed,
        out=args.out,
        **extraction_options(args),
    )
    core.show(found, args)
    accuracy = found.results["detectors"]["s_mcm"].get("accuracy")
    if accuracy is not None:
        message(f"ID accuracy {100 * accuracy:.1f} %")
    message(f"Results: {args.out}")


def explain(args: argparse.Namespace) -> None:
    """Draw one image with the patches that mattered."""
    from ood_core.data.decode import decode

    from ood_iim.explain import explain as look

    if not Path(args.image).is_file():
        raise MissingDataError(f"There is no image {args.image!r}; check the path.")
    found = look(_saved_detector(args), decode(args.image))
    out = args.out or f"{Path(args.image).stem}-iim.png"
    found.draw(out)
    message(f"Picture: {out}")
    if args.json:
        print_json(found.to_dict())
    else:
        decision = {True: ", OOD", False: ", ID", None: ""}[found.is_ood]
        print(f"{found.predicted}: score {found.score:.9g}{decision}")  # noqa: T201


def sweep(args: argparse.Namespace) -> None:
    """Judge combinations of k, alpha, temperature and negatives."""
    from ood_core.data import open_source

    from ood_iim.studies import sweep as run

    tests = {name: open_source(source) for name, source in named_sources(args.ood).items()}
    if not tests and not args.validation:
        raise UsageError("Give OOD test sets (--ood NAME=SOURCE), or OOD images to choose by (--validation SOURCE).")
    validation = {"validation": open_source(args.validation)} if args.validation else {}
    rows = run(
        _saved_detector(args),
        id=open_source(args.id),
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
    _print_table(
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
    from ood_core.prompts import read_class_names

    from ood_iim.detectors import IIM

    names = read_class_names(args.classes)
    detector = IIM.from_released(args.checkpoint, backbone=load_backbone(args), class_names=names)
    detector.save_pretrained(args.out)
    message(f"{len(names)} classes, {detector.negative_prompts} negative prompts. Saved: {args.out}")


def reproduce(args: argparse.Namespace) -> None:
    """Run a protocol or a study of the paper, our numbers beside the published ones."""
    from ood_core.protocols import find_protocol, inspect_protocol

    from ood_iim.studies import STUDIES, Sets

    overrides = dict(pair.partition("=")[::2] for pair in args.overrides)
    if args.study and args.study not in STUDIES:
        raise unknown_name("study", args.study, STUDIES)
    if args.dry_run:
        rows = inspect_protocol(args.protocol, args.root, overrides=overrides)
        if args.json:
            print_json([row._asdict() | {"path": row.path and str(row.path)} for row in rows])
        else:
            _print_table(
                ["set", "found at", "images", "expected"], [["" if x is None else x for x in row] for row in rows]
            )
        return
    found = find_protocol(args.protocol, args.root, overrides=overrides, class_names_file=args.classes)
    message(found.describe())
    if found.train is None:
        raise MissingDataError(f"{args.protocol} has no training images below {args.root}: IIM learns from some.")
    sets = Sets(found.train, found.test, found.ood, found.class_names)
    backbone = load_backbone(args)
    given = dict(map(parse_param, args.param))
    settings = STUDIES[args.study] if args.study else {"": _preset(args.protocol)}
    results: dict[str, Any] = {}
    for shots in args.shots:
        for label, options in settings.items():
            name = f"{shots} shots{f', {label}' if label else ''}"
            results[name] = _trials(args, sets, backbone, shots, name, options | given)
    published = [] if args.study else _published(args.protocol, args.shots)
    if args.json:
        print_json({"protocol": args.protocol, "results": results, "published": published})
        return
    _print_table(
        ["FPR95 / AUROC", *found.ood, "average", "accuracy"],
        [row for name, scores in results.items() for row in _our_rows(name, scores, list(found.ood), args)]
        + [
            [f"published: {row['shots']} shots, {row['method']}", *_cells(row, list(found.ood)), ""]
            for row in published
        ],
    )
    message(f"Every run: {args.out}")


def _trials(
    args: argparse.Namespace, sets: Any, backbone: Any, shots: int, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """The seeds of one setting, averaged; FPR95 by the released rule, which the published numbers follow."""
    from ood_iim.studies import summarise, trial

    runs = []
    for seed in args.seeds:
        folder = Path(args.out) / args.protocol / name.replace(" ", "-") / f"seed-{seed}"
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


def _published(protocol: str, shots: list[int]) -> list[dict[str, Any]]:
    from ood_iim.published import table

    return [row for row in table(1)["rows"] if row["id"] == protocol and row["shots"] in (0, *shots)]


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
    figures = [row["per_set"].get(name) for name in sets] + [row["average"]]
    return ["" if f is None else f"{f['fpr95']:.2f} / {f['auroc']:.2f}" for f in figures]


_MEASURES = ("auroc", "fpr95")


def _new_detector(args: argparse.Namespace, names: list[str], **options: Any) -> IIM:
    from ood_core.detectors import create_detector

    given = dict(map(parse_param, args.param))
    made: Any = create_detector(
        "iim", backbone=load_backbone(args), class_names=names, template=args.template, **(options | given)
    )
    return made


def _saved_detector(args: argparse.Namespace) -> IIM:
    from ood_iim.detectors import IIM

    made = IIM.from_pretrained(args.detector)
    made._set_backbone(load_backbone(args, args.backbone or made._backbone_record["spec"]))
    return made


def _listed(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:5])
    return shown + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _print_table(header: list[str], rows: list[list[Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
