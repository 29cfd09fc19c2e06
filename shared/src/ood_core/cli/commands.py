"""What the verbs of `ood` do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ood_core.cli.common import (
    build_detectors,
    check_output,
    class_names_of,
    extraction_options,
    load_backbone,
    message,
    named_sources,
    print_json,
    save_detectors,
)
from ood_core.errors import DataError, MissingDataError, UsageError


def demo(args: argparse.Namespace) -> None:
    """Write image folders and evaluate every detector on them."""
    from ood_core.demo import run_demo

    found = run_demo(args.out, backbone=load_backbone(args), seed=args.seed, say=message)
    show(found, args)
    message(f"Report: {Path(args.out) / 'report.html'}")


def list_names(args: argparse.Namespace) -> None:
    """Detectors and backbones, broken plug-ins with their error."""
    from ood_core.backbones import list_backbones
    from ood_core.detectors import broken_detectors, list_detectors

    broken = broken_detectors()
    content = {"detectors": list_detectors(), "backbones": list_backbones(), "broken": broken}
    if args.json:
        print_json(content)
        return
    _print(
        "Detectors:", *(f"  {n}" + (f"  (broken: {broken[n]})" if n in broken else "") for n in content["detectors"])
    )
    _print("Backbones:", *(f"  {name}" for name in content["backbones"]))


def doctor(args: argparse.Namespace) -> None:
    """Report the installation."""
    from ood_core.doctor import examine

    found = examine()
    if args.json:
        print_json(found)
        return
    for title, lines in found.items():
        rows = lines.items() if isinstance(lines, dict) else ((line, "") for line in lines)
        _print(f"{title}:", *(f"  {name}{f'  {value}' if value else ''}" for name, value in rows))


def extract(args: argparse.Namespace) -> None:
    """Fill a feature cache."""
    from ood_core.features import extract as compute

    if not args.cache:
        raise UsageError("ood extract keeps features for later: say where with --cache DIR.")
    needs = {need.strip() for need in args.needs.split(",") if need.strip()}
    features = compute(load_backbone(args), args.source, needs=needs, **extraction_options(args))
    _tell_failures(features.failures)
    message(f"{len(features)} images in {args.cache}")


def score(args: argparse.Namespace) -> None:
    """Score one source with one or several detectors."""
    from ood_core.data import open_source
    from ood_core.evaluation import fit_detectors
    from ood_core.evaluation import score as score_source

    check_output(args.out, ".parquet")
    source = open_source(args.source)
    fit = open_source(args.fit) if args.fit else None
    detectors = build_detectors(args, class_names_of(args, fit, source))
    options = extraction_options(args)
    fit_detectors(detectors, fit, **options)
    table, counts = score_source(detectors, source, source=_set_name(args.source), **options)
    if args.out:
        table.write(args.out)
        message(f"{counts['scored']} images scored, {counts['failures']} failed: {args.out}")
    rows = _score_rows(table, detectors)
    if args.json:
        print_json(rows)
    elif not args.out:
        _print("\t".join(rows[0]), *("\t".join(map(_cell, row.values())) for row in rows))


def _score_rows(table: Any, detectors: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for people and JSON: NaN as null, and the decision of every calibrated detector."""
    frame = table.frame.drop(columns="source")
    for name, detector in detectors.items():
        if detector.threshold is not None:
            scored = frame[name].notna()
            frame.loc[scored, f"{name}.ood"] = frame.loc[scored, name] < detector.threshold
            frame.loc[scored, f"{name}.p_value"] = detector.p_value(frame.loc[scored, name].to_numpy()).numpy()
    return json.loads(frame.to_json(orient="records", double_precision=15, force_ascii=False))


def _cell(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else "" if value is None else str(value)


def evaluate(args: argparse.Namespace) -> None:
    """Judge detectors on an ID test set and OOD sets."""
    from ood_core.data import open_source
    from ood_core.evaluation import evaluate as run

    id_source = open_source(args.id)
    fit = open_source(args.fit) if args.fit else None
    ood = {name: open_source(source) for name, source in named_sources(args.ood).items()}
    detectors = build_detectors(args, class_names_of(args, fit, id_source))
    found = run(
        detectors,
        id=id_source,
        ood=ood,
        fit=fit,
        calibrate=open_source(args.calibrate) if args.calibrate else None,
        convention=args.convention,
        bootstrap=args.bootstrap,
        seed=args.seed,
        out=args.out,
        **extraction_options(args),
    )
    show(found, args)
    message(f"Results: {args.out}")


def calibrate(args: argparse.Namespace) -> None:
    """Fit if needed, set thresholds, save."""
    from ood_core.data import open_source
    from ood_core.evaluation import calibrate_detectors, fit_detectors

    id_source = open_source(args.id)
    fit = open_source(args.fit) if args.fit else None
    detectors = build_detectors(args, class_names_of(args, fit, id_source))
    options = extraction_options(args)
    fit_detectors(detectors, fit, **options)
    calibrate_detectors(detectors, id_source, tpr=args.tpr, **options)
    save_detectors(detectors, args.out)
    for name, detector in detectors.items():
        message(f"{name}: scores below {detector.threshold:.9g} are OOD")
    message(f"Saved: {args.out}")


def report(args: argparse.Namespace) -> None:
    """Write the report again."""
    from ood_core.report import write_report
    from ood_core.scores import ScoreTable

    folder = Path(args.folder)
    if not (folder / "results.json").is_file():
        raise MissingDataError(f"{folder} holds no results.json: run `ood evaluate --out {folder}` first.")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{folder / 'results.json'} is no JSON ({error}).") from error
    write_report(folder / "report.html", results, ScoreTable.read(folder / "scores.parquet").frame)
    message(f"Report: {folder / 'report.html'}")


def show(found: Any, args: argparse.Namespace) -> None:
    """Print an evaluation, as a table or as JSON."""
    if args.json:
        print_json(found.results)
        return
    from rich.console import Console

    Console().print(found.table())
    failures = {
        n: d["failures"] for n, d in {"id": found.results["data"]["id"], **found.results["data"]["ood"]}.items()
    }
    if any(failures.values()):
        message("Images without a score: " + ", ".join(f"{n} {count}" for n, count in failures.items() if count))


def _tell_failures(failures: list[tuple[str, str]]) -> None:
    for name, reason in failures[:5]:
        message(f"no features: {name}: {reason}")
    if len(failures) > 5:
        message(f"... and {len(failures) - 5} more")


def _set_name(source: str) -> str:
    return Path(source.rpartition(".parquet:")[0] or source).stem or "images"


def _print(*lines: str) -> None:
    print("\n".join(lines))  # noqa: T201
