"""What the verbs of `ood` do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ood_core.cli.common import (
    build_detectors,
    check_folder,
    check_output,
    check_rate,
    class_names_of,
    extraction_options,
    load_backbone,
    message,
    named_sources,
    one_line,
    open_given,
    parse_pairs,
    print_json,
    save_detectors,
)
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.files import check_schema

if TYPE_CHECKING:
    from ood_core.evaluation import Evaluation


def demo(args: argparse.Namespace) -> None:
    """Write image folders and evaluate every detector on them."""
    from ood_core.demo import run_demo

    found = run_demo(args.out, backbone=load_backbone(args), seed=args.seed, say=message)
    show(found, args)
    message(f"Report: {Path(args.out) / 'report.html'}")


def list_names(args: argparse.Namespace) -> None:
    """Names of detectors and backbones; with --check what each detector needs, or why it cannot be imported."""
    from ood_core.backbones import list_backbones
    from ood_core.detectors import list_detectors

    content: dict[str, Any] = {"detectors": list_detectors(), "backbones": list_backbones()}
    if args.check:
        from ood_core.doctor import check_plugins

        content |= check_plugins()
    if args.json:
        print_json(content)
        return
    wide = max(map(len, content["detectors"]))
    _print("Detectors:", *(f"  {name:{wide}}  {_checked(name, content)}".rstrip() for name in content["detectors"]))
    _print("Backbones:", *(f"  {name}" for name in content["backbones"]))


def _checked(name: str, content: Mapping[str, Any]) -> str:
    if name in content.get("broken", {}):
        return f"broken: {content['broken'][name]}"
    return f"needs {', '.join(content['needs'][name])}" if "needs" in content else ""


def doctor(args: argparse.Namespace) -> None:
    """Report the installation, or what loading a backbone decided."""
    from ood_core.doctor import examine, examine_backbone

    if args.spec:
        print_decisions(examine_backbone(load_backbone(args, args.spec)), args)
        return
    found = examine()
    if args.json:
        print_json(found)
        return
    for title, lines in found.items():
        rows = lines.items() if isinstance(lines, dict) else ((line, "") for line in lines)
        _print(f"{title}:", *(f"  {name}{f'  {value}' if value else ''}" for name, value in rows))


def print_decisions(found: Mapping[str, Any], args: argparse.Namespace) -> None:
    """What `examine_backbone` found, a line for each decision."""
    if args.json:
        print_json(found)
        return
    rows = [[row["what"], row["value"], row["source"]] for row in found["decisions"]]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    _print(*(f"{what:{widths[0]}}  {value:{widths[1]}}  {source}".rstrip() for what, value, source in rows))


def extract(args: argparse.Namespace) -> None:
    """Fill a feature cache."""
    from ood_core.features import extract as compute

    if not args.cache:
        raise UsageError("ood extract keeps features for later: say where with --cache DIR.")
    needs = {need.strip() for need in args.needs.split(",") if need.strip()}
    features = compute(load_backbone(args), open_given(args, args.source), needs=needs, **extraction_options(args))
    _tell_failures(features.failures)
    message(f"{len(features)} images in {args.cache}")


def score(args: argparse.Namespace) -> None:
    """Score one source with one or several detectors."""
    from ood_core.evaluation import fit_detectors
    from ood_core.evaluation import score as score_source

    check_output(args.out, ".parquet")
    check_rate(args.fdr)
    source = open_given(args, args.source)
    fit = open_given(args, args.fit) if args.fit else None
    detectors = build_detectors(args, class_names_of(args, fit))
    options = extraction_options(args)
    fit_detectors(detectors, fit, **options)
    table, counts = score_source(detectors, source, source=_set_name(args.source), classify=True, **options)
    if args.out:
        table.write(args.out)
        message(f"{counts['scored']} images scored, {counts['failures']} failed: {args.out}")
    frame = table.frame.drop(columns="source")
    _show_rows(frame, detectors, args, predicted=counts["predicted"], by_class=args.by_class)


def _show_rows(frame: Any, detectors: dict[str, Any], args: argparse.Namespace, **options: Any) -> None:
    rows = _score_rows(frame, detectors, args.fdr, **options)
    if args.json:
        print_json(rows)
    elif not args.out:
        _print("\t".join(map(one_line, rows[0])), *("\t".join(map(_cell, row.values())) for row in rows))


def _score_rows(
    frame: Any,
    detectors: dict[str, Any],
    fdr: float | None,
    *,
    predicted: Mapping[str, Any] = MappingProxyType({}),
    by_class: bool = False,
) -> list[dict[str, Any]]:
    """Rows for people and JSON: NaN as null, and of every calibrated detector what it decides and predicts."""
    from ood_core.detectors.given import Observed, as_float32

    for name, detector in detectors.items():
        scored = frame[name].notna()
        if detector.threshold is None and (fdr is not None or by_class):
            option = "--fdr" if fdr is not None else "--by-class"
            raise NotFittedError(f"{option} needs calibrated detectors, and {name!r} is not: see `ood calibrate`.")
        if detector.threshold is not None and scored.any():
            classes = predicted.get(name)
            scores = Observed(as_float32(frame.loc[scored, name].to_numpy()), classes, "")
            decisions = detector.is_ood(scores, fdr=fdr, by_class=by_class).numpy()
            frame.loc[scored, f"{name}.ood"] = decisions
            frame.loc[scored, f"{name}.p_value"] = detector.p_value(scores, by_class=by_class).numpy()
            if classes is not None:
                frame.loc[scored, f"{name}.class"] = [detector.class_names[number] for number in classes]
            if fdr is not None:
                message(
                    f"{name}: {decisions.sum()} of {len(decisions)} images are OOD at a false discovery rate of {fdr:g}"
                )
    return json.loads(frame.to_json(orient="records", double_precision=15, force_ascii=False))


def _cell(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else "" if value is None else one_line(str(value))


def evaluate(args: argparse.Namespace) -> None:
    """Judge detectors on an ID test set and OOD sets."""
    sets = given_sets(args)
    fit = open_given(args, args.fit) if args.fit else None
    detectors = build_detectors(args, class_names_of(args, fit, id_test=sets["id"]))
    show(judge(args, detectors, **sets, fit=fit), args)
    message(f"Results: {args.out}")


def given_sets(args: argparse.Namespace) -> dict[str, Any]:
    """The sources of --id and --ood, for `judge`."""
    places = named_sources(args.ood)
    return {"id": open_given(args, args.id), "ood": {name: open_given(args, place) for name, place in places.items()}}


def judge(args: argparse.Namespace, detectors: Mapping[str, Any], **sets: Any) -> Evaluation:
    """Evaluate as the arguments of `add_evaluation_arguments` and `add_extraction_arguments` say.

    Args:
        args: of the command line.
        detectors: by name.
        **sets: of `evaluate`: id, ood, and what else shall not be as the command line says.
    """
    from ood_core.evaluation import evaluate as run

    given = {name: getattr(args, name) for name in ("allow_overlap", "convention", "bootstrap", "seed", "out")}
    if args.calibrate:
        sets["calibrate"] = open_given(args, args.calibrate)
    return run(detectors, **(given | extraction_options(args) | sets))


def calibrate(args: argparse.Namespace) -> None:
    """Fit if needed, set thresholds, save."""
    from ood_core.evaluation import calibrate_detectors, fit_detectors

    id_source = open_given(args, args.id)
    fit = open_given(args, args.fit) if args.fit else None
    detectors = build_detectors(args, class_names_of(args, fit))
    options = extraction_options(args)
    fit_detectors(detectors, fit, **options)
    calibrate_detectors(detectors, id_source, tpr=args.tpr, allow_overlap=args.allow_overlap, **options)
    save_detectors(detectors, args.out)
    for name, detector in detectors.items():
        _tell_calibration(name, detector)
    message(f"Saved: {args.out}")


def _tell_calibration(name: str, detector: Any) -> None:
    known = detector.calibration
    low, high = known.tpr_interval()
    message(f"{name}: scores below {detector.threshold:.9g} are OOD")
    message(
        f"{name}: set to accept {100 * known.tpr:g} % of ID images; with {known.n} calibration images the true share "
        f"lies between {100 * low:.1f} and {100 * high:.1f} % (95 % interval)"
    )


def _tell_stacking(fusion: Any) -> None:
    message(
        f"Stacking has learned from {fusion.labelled_ood['images']} labelled OOD images and every second ID image; the "
        "other half sets the threshold"
    )


def fuse(args: argparse.Namespace) -> None:
    """One score from several: of score tables, or a detector made of detectors."""
    check_rate(args.fdr)
    if bool(args.tables) == bool(args.detector):
        raise UsageError("Give either score tables (ood fuse A.parquet B.parquet) or detectors (--detector A B).")
    if args.labelled_ood and args.combine != "stacking":
        raise UsageError("--labelled-ood is what --combine stacking learns from; nothing else may see it.")
    if args.combine == "stacking" and not args.labelled_ood:
        raise UsageError("--combine stacking learns from OOD images that you name: give them with --labelled-ood.")
    (_fuse_tables if args.tables else _fuse_detectors)(args)


def _fusion_options(args: argparse.Namespace) -> dict[str, Any]:
    weights = None
    if args.weight is not None:
        weights = {
            name: _number(name, value) for name, value in parse_pairs("--weight", args.weight, "NAME=NUMBER").items()
        }
    return {"normalize": args.normalize, "combine": args.combine, "weights": weights}


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"--weight '{name}={value}' must be NAME=NUMBER, e.g. --weight mcm=2.") from None


def _fuse_tables(args: argparse.Namespace) -> None:
    from ood_core.fusion import Fusion

    check_output(args.out, ".parquet")
    if not args.calibration:
        raise UsageError("Give the scores of held-out ID images by the same detectors: --calibration FILE.parquet ...")
    table = _joined_tables(args.tables)
    known = _joined_tables(args.calibration)
    fusion = Fusion(table.detectors, **_fusion_options(args))
    if args.labelled_ood:
        first, known = type(known)(known.frame[::2]), type(known)(known.frame[1::2])
        fusion.fit_stacking(first, _joined_tables(args.labelled_ood))
        _tell_stacking(fusion)
    fused = fusion.calibrate(known, args.tpr).score_table(table, name=args.name)
    _tell_calibration(args.name, fusion)
    if args.out:
        fused.write(args.out)
        scored = int(fused.frame[args.name].notna().sum())
        message(f"{scored} images scored, {len(fused.frame) - scored} without a score: {args.out}")
    _show_rows(fused.frame.copy(), {args.name: fusion}, args)


def _joined_tables(given: list[str]) -> Any:
    """Score tables side by side; images that one of them lacks keep a row and are counted."""
    from ood_core.scores import NO_ROW

    table = None
    for pair in given:
        name, named, file = pair.rpartition("=")
        found = _renamed(file, name) if named else _read_table(file)
        table = found if table is None else table.join(found, missing="record")
    if others := table.extras:  # type: ignore[union-attr]
        message(f"Kept as they are, for they hold no scores (floating-point numbers): {', '.join(map(repr, others))}")
    lacking = table.frame[table.frame["status"].str.startswith(NO_ROW)]  # type: ignore[union-attr]  # one at least
    if len(lacking):
        row = lacking.iloc[0]
        message(
            f"{len(lacking)} images are not in all of {', '.join(given)}; the first, {row['id']!r}: {row['status']}"
        )
    return table


def _read_table(file: str) -> Any:
    from ood_core.scores import ScoreTable

    return ScoreTable.read(file)


def _renamed(file: str, name: str) -> Any:
    """NAME=FILE: its one detector is called NAME, several NAME.DETECTOR."""
    table = _read_table(file)
    names = table.detectors
    new = {old: name if len(names) == 1 else f"{name}.{old}" for old in names}
    return type(table)(table.frame.rename(columns=new))


def _fuse_detectors(args: argparse.Namespace) -> None:
    from ood_core.evaluation import calibrate_detectors, fit_detectors
    from ood_core.fusion import Fusion

    if not args.id or not args.out:
        raise UsageError("A fusion of detectors is calibrated on ID images and saved: give --id SOURCE and --out DIR.")
    check_folder("--out", args.out)
    if len(args.labelled_ood) > 1:
        raise UsageError(f"Give one source of labelled OOD images, not {len(args.labelled_ood)}.")
    id_source = open_given(args, args.id)
    fit = open_given(args, args.fit) if args.fit else None
    fusion = Fusion(build_detectors(args, class_names_of(args, fit)), **_fusion_options(args))
    options = extraction_options(args)
    fit_detectors({args.name: fusion}, fit, **options)
    if args.labelled_ood:
        first, id_source = id_source.subset(slice(0, None, 2)), id_source.subset(slice(1, None, 2))
        fusion.fit_stacking(first, open_given(args, args.labelled_ood[0]), **options)
        _tell_stacking(fusion)
    calibrate_detectors({args.name: fusion}, id_source, tpr=args.tpr, allow_overlap=args.allow_overlap, **options)
    fusion.save_pretrained(args.out)
    _tell_calibration(args.name, fusion)
    message(f"Saved: {args.out}")


def report(args: argparse.Namespace) -> None:
    """Write the report again, with pictures of the images that are at hand."""
    from ood_core.evaluation import image_opener
    from ood_core.report import write_report
    from ood_core.scores import ScoreTable

    folder = Path(args.folder)
    if not (folder / "results.json").is_file():
        raise MissingDataError(f"{folder} holds no results.json: run `ood evaluate --out {folder}` first.")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{folder / 'results.json'} is no JSON ({error}).") from error
    check_schema(results, folder / "results.json", "ood-core")
    table = ScoreTable.read(folder / "scores.parquet")
    sets = ({"id": args.id} if args.id else {}) | named_sources(args.ood)
    if unknown := [name for name in sets if name not in table.sources]:
        raise UsageError(f"{folder} holds no set {unknown[0]!r}; its sets are {', '.join(table.sources)}.")
    write_report(
        folder / "report.html",
        results,
        table.frame,
        image_opener({name: open_given(args, place) for name, place in sets.items()}),
    )
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
