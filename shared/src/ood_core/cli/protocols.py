"""`ood list protocols` and `ood evaluate`, with sets named by hand or by a protocol."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ood_core.cli import commands
from ood_core.cli.common import (
    build_detectors,
    message,
    parse_pairs,
    print_json,
    print_table,
)
from ood_core.errors import DataError, MissingDataError, UsageError

if TYPE_CHECKING:
    from ood_core.detectors.base import Detector
    from ood_core.evaluation import Evaluation
    from ood_core.protocols import FoundSet, Protocol

__all__ = ["add_protocol_arguments", "evaluate", "list_names"]


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """--protocol, --root, --set, --dry-run."""
    parser.add_argument("--protocol", metavar="NAME", help="take all sets from a benchmark: see `ood list protocols`")
    parser.add_argument("--root", metavar="DIR", help="the folder with the protocol's data sets")
    parser.add_argument(
        "--set", metavar="NAME=PLACE", action="extend", nargs="+", default=[], help="another place of a protocol's set"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what is found of the protocol, and where")
    parser.set_defaults(convention=None)  # that of the protocol


def list_names(args: argparse.Namespace) -> None:
    """Detectors and backbones, or protocols."""
    if args.what is None:
        commands.list_names(args)
        return
    from ood_core.protocols import list_protocols, summarise_protocol

    found = [summarise_protocol(name) for name in list_protocols()]
    if args.json:
        print_json(found)
        return
    wide = max(len(about["name"]) for about in found)
    commands._print(*(f"{about['name']:{wide}}  {_about(about)}" for about in found))


def _about(about: Mapping[str, Any]) -> str:
    """ID set, then the OOD sets by kind."""
    if "error" in about:
        return f"broken: {about['error']}"
    kinds = dict.fromkeys(about["sets"].values())
    parts = [", ".join(name for name, own in about["sets"].items() if own == kind) for kind in kinds]
    sets = "; ".join(f"{kind or 'OOD'}: {part}" for kind, part in zip(kinds, parts, strict=True))
    return f"{about['title']}; {sets}" + (f" ({len(about['tasks'])} tasks)" if "tasks" in about else "")


def evaluate(args: argparse.Namespace) -> None:
    """Judge detectors on the sets of a protocol, or on those given."""
    if args.protocol is None:
        _require(args, "detector", "id", "ood", "out")
        _refuse(args, "without --protocol NAME", "root", "set", "dry_run")
        args.convention = args.convention or "standard"
        commands.evaluate(args)
        return
    _require(args, "root", *([] if args.dry_run else ["detector", "out"]))
    _refuse(args, "with --protocol, which names the images: see --set NAME=PLACE", "id", "ood", "fit")
    if args.dry_run:
        _dry_run(args)
        return
    from ood_core.protocols import find_tasks

    tasks = find_tasks(args.protocol, args.root, **_options(args), seed=args.seed)
    if len(tasks) == 1:
        found = _evaluate(args, tasks[0], Path(args.out))
        commands.show(found, args)
    else:
        _evaluate_all(args, tasks)
    message(f"Results: {args.out}")


def _require(args: argparse.Namespace, *names: str) -> None:
    if absent := [f"--{name}" for name in names if not getattr(args, name)]:
        hint = "" if args.protocol else "; or take all sets from a benchmark: --protocol NAME --root DIR"
        raise UsageError(f"`ood evaluate` needs {', '.join(absent)}{hint}.")


def _refuse(args: argparse.Namespace, where: str, *names: str) -> None:
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]:
        raise UsageError(f"{', '.join(given)} cannot be used {where}.")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Other places and names, for `find_tasks`."""
    return {"overrides": parse_pairs("--set", args.set, "NAME=PLACE"), "class_names_file": args.classes}


def _dry_run(args: argparse.Namespace) -> None:
    """Every set with its place and count; exit status 3 where the evaluation would find too little."""
    from ood_core.protocols import find_tasks, inspect_protocol

    options = _options(args)
    try:
        tasks = find_tasks(args.protocol, args.root, **options)
    except (MissingDataError, DataError) as error:
        rows = inspect_protocol(args.protocol, args.root, options["overrides"])
        _show_places(args, rows, [])
        if wrong := [row.name for row in rows if row.error and not row.dispensable]:
            sentence = f"{args.protocol}: {len(wrong)} of {len(rows)} sets cannot be used ({', '.join(wrong)})."
            raise type(error)(sentence) from error
        raise
    several = len(tasks) > 1
    rows = inspect_protocol(args.protocol, args.root, options["overrides"]) if several else tasks[0].found
    _show_places(args, rows, tasks)


def _show_places(args: argparse.Namespace, rows: Sequence[FoundSet], tasks: Sequence[Protocol]) -> None:
    from ood_core.protocols import describe

    notes = list(dict.fromkeys(note for task in tasks for note in task.notes))
    if args.json:
        sets = [row.to_dict() for row in rows]
        print_json({"protocol": args.protocol, "sets": sets, "tasks": [task.name for task in tasks], "notes": notes})
        return
    commands._print(describe(rows))
    for task in tasks:
        message(f"{task.name}: {len(task.class_names)} classes, FPR95 {task.convention}")
    for note in notes:
        message(f"Note: {note}")


def _evaluate(args: argparse.Namespace, task: Protocol, out: Path) -> Evaluation:
    """Judge on one task and write the results, with what was found and expected."""
    from ood_core.reproduction.published import IMAGENET_CLASSES

    message(task.describe())
    detectors = build_detectors(args, task.class_names)
    found = commands.judge(
        args,
        detectors,
        id=task.test,
        ood=task.ood,
        fit=task.train if _to_fit(detectors) else None,
        calibrate=task.calibration,
        convention=args.convention or task.convention,
        set_kinds=task.kinds,
        notes=task.notes,
        out=None,
    )
    sets = [row.to_dict() for row in task.found]
    found.results["protocol"] = {"name": task.name, "title": task.title, "sets": sets}
    if len(task.wnids) == IMAGENET_CLASSES:
        _put_published_accuracy(found.results, detectors)
    found.write(out)
    return found


def _put_published_accuracy(results: dict[str, Any], detectors: Mapping[str, Detector]) -> None:
    """The zero-shot detectors' ID accuracy beside the published one: in the results, and a sentence for people."""
    from ood_core.detectors.zero_shot import ZeroShot
    from ood_core.reproduction.published import accuracy_beside

    said = {}
    for name, detector in detectors.items():
        figures = results["detectors"][name]
        if not isinstance(detector, ZeroShot) or "accuracy" not in figures or detector.backbone is None:
            continue
        record, sentence = accuracy_beside(detector.backbone.spec, detector.template, figures["accuracy"])
        if record:
            figures["published_accuracy"] = record
            said[sentence] = record["off"]
    for sentence in said:
        message(sentence)
    results["data"]["notes"] += [sentence for sentence, off in said.items() if off]


def _to_fit(detectors: Mapping[str, Detector]) -> bool:
    """Whether any learns here; a large training set is not even looked at otherwise."""
    from ood_core.detectors.base import leaves

    return not all(leaf.fitted for leaf in leaves(*detectors.values()))


def _evaluate_all(args: argparse.Namespace, tasks: Sequence[Protocol]) -> None:
    """Judge on every task, each with a folder of its own, and show the means over the tasks."""
    from ood_core.files import write_json

    results = {task.name: _evaluate(args, task, Path(args.out) / task.name).results for task in tasks}
    means = _means(list(results.values()))
    summary = {"protocol": args.protocol, "tasks": list(results), "mean": means}
    write_json(Path(args.out) / "tasks.json", summary)
    if args.json:
        print_json(summary | {"results": results})
        return
    rows = [[name, *(f"{100 * figure[m]:.1f}" for m in ("auroc", "fpr95"))] for name, figure in means.items()]
    print_table([f"mean of {len(tasks)} tasks, percent", "AUROC", "FPR95"], rows)


def _means(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the averages over OOD sets, by detector."""
    figures = [result["detectors"] for result in results]
    return {
        name: {m: fmean(one[name]["average"][m] for one in figures) for m in ("auroc", "fpr95")} for name in figures[0]
    }
