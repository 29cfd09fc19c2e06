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
    print_differences,
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
    from ood_core.published import Beside

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
    negatives = detector.prompts.negative_prompts
    message(f"Learning {len(names)} class prompts and {negatives} negatives from {len(source)} images")
    fit_detector(args, detector, source, cache=args.cache, workers=args.workers)


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
        convention=args.convention,
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
        ["k", "alpha", "T", "negatives", "AUROC", f"FPR95 ({args.convention})"],
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
    message(f"{len(names)} classes, {detector.prompts.negative_prompts} negative prompts. Saved: {args.out}")


def reproduce(args: argparse.Namespace) -> None:
    """Run a protocol or a study of the paper, our numbers beside the published ones."""
    from ood_core.protocols import find_protocol, inspect_protocol
    from ood_core.published import zero_shot_beside

    from ood_iim.studies import STUDIES, Sets

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
    found = find_protocol(args.protocol, args.root, overrides=overrides, class_names_file=args.classes)
    message(found.describe())
    if found.train is None:
        raise MissingDataError(f"{args.protocol} has no training images below {args.root}: IIM learns from some.")
    sets = Sets(found.train, found.test, found.ood, found.class_names)
    backbone = load_backbone(args)
    settings = _settings(args, backbone)
    args.cache = _trial_cache(args, sets, backbone)
    extraction = extraction_options(args) | {"needs": {"image", "local"}}
    zero_shot, sentence = zero_shot_beside(backbone, found.test, found.class_names, args.template, **extraction)
    results: dict[str, Any] = {}
    extra: dict[str, list[dict[str, Any]]] = {}
    main: dict[str, str] = {}
    for shots in args.shots:
        for label, options in settings.items():
            name = f"{shots} shots{f', {label}' if label else ''}"
            results[name] = _trials(args, sets, backbone, shots, name, options)
            negatives = options.get("negatives", "use")
            main[name] = "s_mcm" if negatives == "use" else "s_mcm*"
            extra[name] = _beyond_scores(args, sets, backbone, name, label, negatives)
    published = _published(args.study, found.title, args.shots)
    compared = _compared(args.study, results, main, published)
    if args.json:
        given = {"protocol": args.protocol, "convention": _CONVENTION, "zero_shot_accuracy": zero_shot}
        given |= {"results": results, "study": extra, "published": published}
        print_json(given | {"differences": [one.to_dict() for one in compared]})
        return
    _print_tables(args, results, main, list(found.ood), published, extra)
    print_differences(compared, [*found.ood, "average"], ["fpr95", "auroc"])
    if sentence:
        message(sentence)
    message(f"Every run: {args.out}")


# The rule of FPR95 behind the published numbers, for all that `reproduce` prints.
_CONVENTION = "released"


def _settings(args: argparse.Namespace, backbone: Any) -> dict[str, dict[str, Any]]:
    """Label -> options of IIM: the protocol's preset, then what was given, then what a study varies."""
    from math import prod

    from ood_core.runs import study_options

    from ood_iim.detectors import IIM
    from ood_iim.studies import STUDIES, within_grid

    rows = study_options(STUDIES[args.study] if args.study else {"": {}}, parse_params(args.param), message)
    rows = {label: _preset(args.protocol) | options for label, options in rows.items()}
    for options in rows.values():
        IIM().set_params(**options)  # a mistake shows here, not after a training
    return within_grid(rows, prod(backbone.grid or ())) if args.study == "k" else rows


def _trial_cache(args: argparse.Namespace, sets: Any, backbone: Any) -> str | None:
    """The folder of test features, so that every trial after the first only trains; None where the disk is too full."""
    from math import prod
    from shutil import disk_usage

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
    from ood_iim.detectors import IIM
    from ood_iim.studies import swept_trial

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
    from math import prod

    from ood_core.detectors.zero_shot import default_k

    return default_k(detector.scoring.k, prod(backbone.grid))


def _reproduce_prototypes(args: argparse.Namespace) -> None:
    """Fig. 3: numbers, and a picture where matplotlib is installed."""
    from ood_core.files import write_json
    from ood_core.prompts import read_class_names

    from ood_iim.plot import draw_prototypes
    from ood_iim.prototypes import imagenet_halves, prototypes

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


def _print_tables(
    args: argparse.Namespace,
    results: dict[str, Any],
    main: dict[str, str],
    sets: list[str],
    published: list[dict[str, Any]],
    extra: dict[str, list[dict[str, Any]]],
) -> None:
    """All scores, or the main one of every row of a study, beside the published ones; then what a study adds."""
    whole = args.study in (None, "scores")
    print_table(
        [f"FPR95 / AUROC (rule of FPR95: {_CONVENTION})", *sets, "average", "accuracy"],
        [
            _our_row(name, score, scores[score], sets)
            for name, scores in results.items()
            for score in (scores if whole else [main[name]])
        ]
        + [[f"published: {row['shots']} shots, {row['method']}", *_cells(row, sets), ""] for row in published],
    )
    for name, lines in extra.items():
        if lines:
            message(f"{name}, {main[name]}, seed {args.seeds[0]}")
            print_table(
                ["k", "alpha", "AUROC", f"FPR95 ({_CONVENTION})"],
                [[row["k"], row["alpha"], *(_percent(row[m]) for m in _MEASURES)] for row in lines],
            )


def _compared(
    study: str | None, results: dict[str, Any], main: dict[str, str], published: list[dict[str, Any]]
) -> list[Beside]:
    """The main score of every row beside the published row of the same training."""
    from ood_core.published import beside

    from ood_iim.studies import STUDIES

    found = []
    for row in published:
        if study:  # the paper's rows are the study's, in its order
            label = list(STUDIES[study])[published.index(row)]
        elif row["method"] in ("IIM", "IIM*"):
            label = ""
        else:
            continue  # other methods
        name = f"{row['shots']} shots{f', {label}' if label else ''}"
        figures = results[name][main[name]]
        ours = {one: {m: 100 * figures[one][m][0] for m in _MEASURES} for one in figures if one != "accuracy"}
        found += beside(name, ours, {**row["ood"], "average": row["average"]})
    return found


def _our_row(name: str, score: str, figures: dict[str, Any], sets: list[str]) -> list[str]:
    cells = [" / ".join(f"{100 * figures[one][m][0]:.2f}" for m in ("fpr95", "auroc")) for one in (*sets, "average")]
    accuracy = figures.get("accuracy")
    return [f"{name}: {score}", *cells, "" if accuracy is None else _percent(accuracy[0])]


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
