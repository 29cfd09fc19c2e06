"""What the verbs of `ood-setar` do."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
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
from ood_core.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from ood_core.backbones.base import Backbone
    from ood_core.data.sources import ImageSource
    from ood_core.protocols import FoundSet

    from ood_setar.edit import SeTAREdit


def search(args: argparse.Namespace) -> None:
    """Search, save the edit beside its log."""
    from ood_setar._steps import search_in
    from ood_setar.search import search as find

    options = _options(args, find)
    _tell(args, search_in(args.out, load_backbone(args), _training_images(args), **options))


def finetune(args: argparse.Namespace) -> None:
    """Train what a search dropped, or LoRA."""
    from ood_setar._steps import lora_start, train_in
    from ood_setar.edit import SeTAREdit
    from ood_setar.finetune import finetune as train

    backbone = load_backbone(args)
    start = SeTAREdit.from_pretrained(args.edit) if args.edit else lora_start(backbone, rank=args.rank, seed=args.seed)
    _tell(args, train_in(args.out, backbone, _training_images(args), start, **_options(args, train)))


def apply(args: argparse.Namespace) -> None:
    """Write the edited model."""
    from ood_setar.edit import SeTAREdit

    edit = SeTAREdit.from_pretrained(args.edit)
    message(edit.apply(_backbone_of(args, edit)).save(args.out))


def evaluate(args: argparse.Namespace) -> None:
    """Vanilla and edited side by side: OOD detection, or accuracy."""
    from ood_setar.edit import SeTAREdit

    if not args.id or (not args.ood and not args.classify):
        raise UsageError("Give --id SOURCE, and --ood NAME=SOURCE ... or --classify LABELS.json.")
    edit = SeTAREdit.from_pretrained(args.edit)
    vanilla = _backbone_of(args, edit)
    backbones = {"vanilla": vanilla, _label(edit): edit.apply(vanilla)}
    source = open_given(args, args.id)
    if args.classify:
        _classify(args, backbones, source)
        return
    found = _evaluate(args, backbones, source)
    core.show(found, args)
    if args.out:
        message(f"Results: {args.out}")


def show(args: argparse.Namespace) -> None:
    """Print the ratios and the path of the search, and draw them."""
    from ood_setar._steps import read_edit

    edit = read_edit(args.edit)
    steps = edit.record.get("steps", [])
    if args.out:
        from ood_setar.plot import draw

        draw(edit, args.out)
        message(f"Picture: {args.out}")
    if args.json:
        print_json({"ratios": edit.ratios, "drop": edit.drop, "released": edit.to_released(), "record": edit.record})
        return
    by_weight = {step["weight"]: step for step in steps}
    rows = [[name, f"{ratio:g}", *_search_cells(by_weight.get(name))] for name, ratio in edit.ratios.items()]
    print_table(["weight", "ratio", "best so far", "margin", ""], rows)


def reproduce(args: argparse.Namespace) -> None:
    """Run a table of the paper, our numbers beside the published ones."""
    from ood_core.protocols import inspect_protocol

    from ood_setar import reproduce as paper
    from ood_setar._published import published_table

    names, overrides = args.protocol or paper.PROTOCOLS[args.table], parse_pairs("--set", args.overrides, "NAME=PATH")
    if args.dry_run:
        _show_places(args, {name: inspect_protocol(name, args.root, overrides) for name in names})
        return
    benches, scores = _benches(args, names, overrides)
    labels = parse_pairs("--labels", args.labels, "NAME=PATH")
    results = [paper.reproduce(args.table, bench, scores, labels) for bench in benches]
    table = published_table(args.table)
    message(f"{table['source']}: {table['note']}")
    found = [paper.compared(result) for result in results]
    if args.json:
        for result, own in zip(results, found, strict=True):
            result["differences"] = [one.to_dict() for one in own]
        print_json({"table": args.table, "unit": "percent", "note": table["note"], "results": results})
        return
    for result, own in zip(results, found, strict=True):
        print_table(*paper.lines(result))
        print_differences(own, [*result["sets"], "average"], paper.MEASURES)
        if sentence := result["zero_shot_accuracy"].get("sentence"):
            message(sentence)
    message(f"Every run: {args.out}")


# ---- parts


def _benches(args: argparse.Namespace, names: Sequence[str], overrides: dict[str, str]) -> tuple[list[Any], list[str]]:
    """The protocols that are here with the backbone asked for, and the scores; mistakes are found before any work."""
    from ood_setar import reproduce as paper

    if bool(args.labels) != (args.table == 4) or (args.scores and args.table == 4):
        raise UsageError("Table 4 is of accuracies: it takes --labels NAME=FILE, the other tables --scores NAME.")
    places = {"overrides": overrides, "class_names_file": args.classes}
    protocols = paper.find(names, args.root, skip=not args.protocol, say=message, **places)
    edit = _searched_elsewhere(args.edit, [protocol.name for protocol in protocols]) if args.edit else None
    backbone = load_backbone(args)
    scores = list(dict.fromkeys(args.scores or paper.default_scores(args.table, backbone)))
    options = parse_params(args.param)
    common: dict[str, Any] = {"template": args.template, "seeds": args.seeds, "edit": edit, "say": message}
    common["extraction"] = extraction_options(args)
    benches = [paper.Bench(protocol, backbone, Path(args.out), options, **common) for protocol in protocols]
    for bench in benches:
        message(f"{bench.protocol.describe()}\n{paper.describe_options(bench)}")
        paper.find_mistakes(args.table, bench, scores)
    return benches, scores


def _searched_elsewhere(path: str, protocols: Sequence[str]) -> SeTAREdit:
    from ood_setar._steps import read_edit

    edit = read_edit(path)
    if len(protocols) > 1:
        raise UsageError(f"--edit is of one ID set: choose it with --protocol, of {', '.join(protocols)}.")
    if edit.factors:
        raise UsageError(f"--edit {path!r} is fine-tuned: give the edit of the search that it started from.")
    return edit


def _show_places(args: argparse.Namespace, found: Mapping[str, Sequence[FoundSet]]) -> None:
    """What is found of the protocols, and where."""
    from ood_core.protocols import describe

    if args.json:
        print_json({name: list(map(_place, rows)) for name, rows in found.items()})
        return
    for name, rows in found.items():
        print_table([name], [[line] for line in describe(rows).splitlines()])


def _place(row: FoundSet) -> dict[str, Any]:
    path, error = (None if value is None else str(value) for value in (row.path, row.error))
    return {"set": row.name, "path": path, "images": row.images, "expected": row.expected, "error": error}


# By arguments of the commands, or by what they do with --out.
_SET_OTHERWISE = {"backbone", "images", "edit", "log_file", "checkpoint", "progress"}
_FLAGS = {"class_names": "--classes", "template": "--template", "seed": "--seed", "workers": "--workers"}


def _options(args: argparse.Namespace, function: Callable[..., Any]) -> dict[str, Any]:
    """Class names, template, seed and the --param of a function."""
    given = parse_params(args.param)
    known = inspect.signature(function).parameters.keys() - _SET_OTHERWISE
    for name in given:
        if name in _FLAGS:
            raise UsageError(f"--param {name}= is a flag of its own: give {_FLAGS[name]}.")
        if name not in known:
            raise unknown_name(f"option of {function.__name__}", name, known - _FLAGS.keys())
    own = {"class_names": given_class_names(args), "template": args.template}
    return own | {"seed": args.seed, "workers": args.workers} | given


def _training_images(args: argparse.Namespace) -> ImageSource:
    from ood_core.data import FewShot

    source = open_given(args, args.source)
    return source if args.shots is None else FewShot(source, args.shots, args.seed)


def _backbone_of(args: argparse.Namespace, edit: SeTAREdit) -> Backbone:
    """The backbone asked for, else the one that the edit was made on."""
    made = edit.record.get("search") or edit.record.get("finetune") or {}
    return load_backbone(args, args.backbone or made.get("backbone", {}).get("spec"))


def _label(edit: SeTAREdit) -> str:
    if edit.factors:
        return "LoRA" if "lora" in edit.record else "SeTAR+FT"
    return "SeTAR"


def _evaluate(args: argparse.Namespace, backbones: Mapping[str, Backbone], source: ImageSource) -> Any:
    from ood_core.cli.common import class_names_of
    from ood_core.detectors import detector_class
    from ood_core.evaluation import evaluate as run

    from ood_setar._steps import new_detector

    given = parse_params(args.param)
    known = {option for name in args.detector for option in detector_class(name).option_names()}
    if unused := sorted(given.keys() - known):
        raise UsageError(f"None of the detectors has an option {unused[0]!r}.")
    names = class_names_of(args, id_test=source)
    detectors = {
        f"{name}, {label}": new_detector(name, backbone, names, args.template, given)
        for name in args.detector
        for label, backbone in backbones.items()
    }
    return run(
        detectors,
        id=source,
        ood={name: open_given(args, path) for name, path in named_sources(args.ood).items()},
        calibrate=open_given(args, args.calibrate) if args.calibrate else None,
        allow_overlap=args.allow_overlap,
        convention=args.convention,
        bootstrap=args.bootstrap,
        seed=args.seed,
        out=args.out,
        **extraction_options(args),
    )


def _classify(args: argparse.Namespace, backbones: Mapping[str, Backbone], source: ImageSource) -> None:
    """Zero-shot accuracy over the labels of a file of the released code."""
    from ood_setar._steps import accuracy
    from ood_setar.lists import with_labels

    labelled, options = with_labels(source, args.classify), extraction_options(args)
    template = args.template or "a photo of a {}"
    found = {label: accuracy(backbone, labelled, template, **options) for label, backbone in backbones.items()}
    if args.json:
        print_json({"images": len(labelled), "classes": len(labelled.label_names), "accuracy": found})
        return
    print_table(["", "accuracy"], [[label, f"{100 * value:.2f}"] for label, value in found.items()])


def _tell(args: argparse.Namespace, edit: SeTAREdit) -> None:
    dropped = {name: ratio for name, ratio in edit.ratios.items() if ratio}
    message(f"{_label(edit)}: {len(dropped)} of {len(edit.ratios)} weights lose singular values")
    if "history" in edit.record:
        message("Last epoch: " + ", ".join(f"{name} {value:.4g}" for name, value in edit.record["history"][-1].items()))
    message(f"Saved: {args.out}")
    if args.json:
        print_json({"edit": args.out, "ratios": edit.ratios, "history": edit.record.get("history", [])})
    else:
        print_table(["weight", "ratio"], [[name, f"{ratio:g}"] for name, ratio in edit.ratios.items()])


def _search_cells(step: Mapping[str, Any] | None) -> list[str]:
    if step is None:
        return ["", "", ""]
    margin = "" if step["margin"] is None else f"{step['margin']:.2g}"
    return [f"{step['value']:.6g}", margin, "near tie" if step["near_tie"] else ""]
