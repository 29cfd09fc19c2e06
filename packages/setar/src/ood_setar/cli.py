"""The command `ood-setar`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ood_core.cli.common import (
    add_backbone_arguments,
    add_class_arguments,
    add_command,
    add_evaluation_arguments,
    add_json_argument,
    add_param_argument,
    add_reading_arguments,
    add_shots_argument,
    add_source_arguments,
    add_workers_argument,
    command_parser,
    default_workers,
    run,
)
from ood_core.reproduction.command import add_reproduce

from ood_setar import __version__, commands

__all__ = ["main"]

_TEMPLATE = "a photo of a {}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-setar` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser, verbs = command_parser(
        "ood-setar",
        f"ood-setar {__version__}",
        "SeTAR: selective low-rank approximation of a pretrained model's weights for out-of-distribution detection "
        "(NeurIPS 2024).",
    )

    search = add_command(verbs, "search", commands.search, "find the weights to truncate on labelled ID images")
    search.add_argument("source", metavar="SOURCE", help="labelled ID images, about one per class or more")
    search.add_argument("--out", metavar="DIR", required=True, help="where the edit goes; its log makes a rerun resume")
    _add_making_arguments(search, "search")

    finetune = add_command(verbs, "finetune", commands.finetune, "train the directions that a search dropped")
    finetune.add_argument("source", metavar="SOURCE", help="labelled ID images, usually those of the search")
    finetune.add_argument("--edit", metavar="DIR", help="of `ood-setar search`; without it LoRA on every weight")
    finetune.add_argument("--rank", type=int, default=32, help="of LoRA (default: 32)")
    finetune.add_argument("--out", metavar="DIR", required=True, help="where the edit goes")
    _add_making_arguments(finetune, "finetune")

    apply = add_command(verbs, "apply", commands.apply, "write an edited model's weights as other programs read them")
    _add_edit_argument(apply)
    apply.add_argument("--out", metavar="DIR", required=True)
    add_backbone_arguments(apply, default=None, dtype="float32")

    evaluate = add_command(verbs, "evaluate", commands.evaluate, "judge scores with and without the edit")
    _add_edit_argument(evaluate)
    evaluate.add_argument(
        "--detector", metavar="NAME", nargs="+", default=["mcm", "gl_mcm"], help="default: mcm gl_mcm"
    )
    add_evaluation_arguments(evaluate, required=False)
    evaluate.add_argument("--classify", metavar="LABELS.json", help="accuracy on --id by these labels instead")
    add_param_argument(evaluate, "option of the detectors")
    add_class_arguments(evaluate)
    evaluate.add_argument("--out", metavar="DIR", help="for results.json, scores.parquet and report.html")
    add_reading_arguments(evaluate, backbone=None)

    show = add_command(verbs, "show", commands.show, "print and plot what an edit drops and how its search went")
    show.add_argument("edit", metavar="DIR", help="a saved edit, or a config_best.json of the released code")
    show.add_argument("--out", metavar="FILE.png", help="picture to write")
    add_json_argument(show)

    _add_reproduce(verbs)
    return parser


def _add_reproduce(verbs: Any) -> None:
    parser = add_reproduce(
        verbs,
        "ood_setar",
        "run a table of the paper on your data, beside what was published",
        seeds=(3, 4, 5),
        backbone="open_clip:ViT-B-16/openai",
        dtype="float32",
    )
    parser.add_argument("--table", type=int, choices=(1, 2, 3, 4), required=True, help="4 is of accuracies")
    parser.add_argument(
        "--protocol",
        nargs="+",
        choices=("setar-imagenet-1k", "setar-voc"),
        help="default: those that the table has figures of, if they are found",
    )
    parser.add_argument(
        "--scores", metavar="NAME", nargs="+", help="default: the table's for the backbone; NAME@T is at temperature T"
    )
    parser.add_argument("--edit", metavar="DIR", help="searched elsewhere (or a released config_best.json): no search")
    parser.add_argument(
        "--labels",
        metavar="NAME=FILE",
        action="extend",
        nargs="+",
        default=[],
        help="labels of an image set, for table 4",
    )
    add_class_arguments(parser, _TEMPLATE, repr(_TEMPLATE))


def _add_making_arguments(parser: argparse.ArgumentParser, function: str) -> None:
    add_class_arguments(parser, _TEMPLATE, repr(_TEMPLATE))
    add_shots_argument(parser)
    parser.add_argument("--seed", type=int, default=5, help="of the draw and all that is random (default: 5)")
    add_param_argument(parser, f"option of {function} (see README)")
    add_backbone_arguments(parser, dtype="float32")  # rounded weights have other singular values
    add_workers_argument(parser, default_workers())
    add_source_arguments(parser)
    add_json_argument(parser)


def _add_edit_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--edit", metavar="DIR", required=True, help="of `ood-setar search` or `finetune`")
