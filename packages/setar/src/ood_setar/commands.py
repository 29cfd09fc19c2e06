"""What the verbs of `ood-setar` do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ood_core.cli import commands as core
from ood_core.cli.common import (
    class_names_of,
    extraction_options,
    given_class_names,
    load_backbone,
    message,
    named_sources,
    open_given,
    parse_params,
    print_json,
    print_table,
    training_images,
)
from ood_core.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from ood_core.backbones.base import Backbone
    from ood_core.data.sources import ImageSource
    from ood_core.evaluation import Evaluation

    from ood_setar.edit import SeTAREdit


def search(args: argparse.Namespace) -> None:
    """Search, save the edit beside its log."""
    from ood_setar.search import search as find
    from ood_setar.search import search_in

    options = _options(args, find)
    _tell(
        args, search_in(args.out, load_backbone(args), training_images(args, open_given(args, args.source)), **options)
    )


def finetune(args: argparse.Namespace) -> None:
    """Train what a search dropped, or LoRA."""
    from ood_setar.edit import SeTAREdit
    from ood_setar.finetune import finetune as train
    from ood_setar.finetune import lora_start, train_in

    backbone = load_backbone(args)
    start = SeTAREdit.from_pretrained(args.edit) if args.edit else lora_start(backbone, rank=args.rank, seed=args.seed)
    _tell(
        args,
        train_in(
            args.out, backbone, training_images(args, open_given(args, args.source)), start, **_options(args, train)
        ),
    )


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
    from ood_setar.edit import read_edit

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


# ---- parts


# By arguments of the commands, or by what they do with --out.
_SET_OTHERWISE = {"backbone", "images", "edit", "log_file", "checkpoint", "progress"}
_FLAGS = {"class_names": "--classes", "template": "--template", "seed": "--seed", "workers": "--workers"}


def _options(args: argparse.Namespace, function: Callable[..., Any]) -> dict[str, Any]:
    """Class names, template, seed and the --param of a function."""
    from ood_core.options import option_names

    given = parse_params(args.param)
    known = set(option_names(function, *_SET_OTHERWISE))
    for name in given:
        if name in _FLAGS:
            raise UsageError(f"--param {name}= is a flag of its own: give {_FLAGS[name]}.")
        if name not in known:
            raise unknown_name(f"option of {function.__name__}", name, known - _FLAGS.keys())
    own = {"class_names": given_class_names(args), "template": args.template}
    return own | {"seed": args.seed, "workers": args.workers} | given


def _backbone_of(args: argparse.Namespace, edit: SeTAREdit) -> Backbone:
    """The backbone asked for, else the one that the edit was made on."""
    made = edit.record.get("search") or edit.record.get("finetune") or {}
    return load_backbone(args, args.backbone or made.get("backbone", {}).get("spec"))


def _label(edit: SeTAREdit) -> str:
    if edit.factors:
        return "LoRA" if "lora" in edit.record else "SeTAR+FT"
    return "SeTAR"


def _evaluate(args: argparse.Namespace, backbones: Mapping[str, Backbone], source: ImageSource) -> Evaluation:
    from ood_core.detectors import create_detector, detector_class, known_options
    from ood_core.options import method_options

    given = parse_params(args.param)
    known = {option for name in args.detector for option in method_options(detector_class(name))}
    if unused := sorted(given.keys() - known):
        raise UsageError(f"None of the detectors has an option {unused[0]!r}.")
    names = class_names_of(args, id_test=source)
    detectors = {
        f"{name}, {label}": create_detector(
            name, backbone=backbone, class_names=names, template=args.template, **known_options(name, given)
        )
        for name in args.detector
        for label, backbone in backbones.items()
    }
    ood = {name: open_given(args, path) for name, path in named_sources(args.ood).items()}
    return core.judge(args, detectors, id=source, ood=ood)


def _classify(args: argparse.Namespace, backbones: Mapping[str, Backbone], source: ImageSource) -> None:
    """Zero-shot accuracy over the labels of a file of the released code."""
    from ood_setar.lists import accuracy, with_labels

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
