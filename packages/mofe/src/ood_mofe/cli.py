"""The command `ood-mofe`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_core.cli.common import add_command, add_score_arguments, default_workers, run
from ood_core.cli.methods import (
    add_evaluate_arguments,
    add_explain_arguments,
    add_fit_arguments,
    add_reading_arguments,
)

from ood_mofe import __version__, commands

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-mofe` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-mofe",
        description="MoFE: mixture of feature experts and Dynamic-beta Mixup for out-of-distribution detection (ICCV "
        "2025). A SOURCE is a folder of images, a manifest (csv, tsv, jsonl, txt or parquet with a column path) or "
        "FILE.parquet[:split].",
    )
    parser.add_argument("--version", action="version", version=f"ood-mofe {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    partition = add_command(verbs, "partition", commands.partition, "divide the classes among experts, print and plot")
    _add_partition_arguments(partition)

    fit = add_command(verbs, "fit", commands.fit, "train experts on labelled ID images and save the detector")
    add_fit_arguments(fit, seed=0)

    score = add_command(verbs, "score", commands.score, "score images with a saved detector")
    add_score_arguments(score)

    evaluate = add_command(verbs, "evaluate", commands.evaluate, "judge all scores of a saved detector")
    add_evaluate_arguments(evaluate)

    explain = add_command(
        verbs, "explain", commands.explain, "draw an image's expert, its nearest training images and its distance"
    )
    add_explain_arguments(explain, "mofe")
    explain.add_argument("--train", metavar="SOURCE", help="what the detector was fitted on, to show nearest images")

    reproduce = add_command(
        verbs, "reproduce", commands.reproduce, "run a table of the paper on your data, beside what was published"
    )
    _add_reproduction_arguments(reproduce)
    for training in (fit, reproduce):
        training.set_defaults(workers=default_workers())
    return parser


def _add_partition_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="labelled ID images, e.g. one folder per class")
    parser.add_argument(
        "--param",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="option of MoFE such as experts=7 (see README)",
    )
    parser.add_argument("--groups", metavar="FILE", help="csv of class and group, to start from or to look at")
    parser.add_argument("--out", metavar="FILE.csv", help="groups to write, for --param groups= of fit")
    parser.add_argument("--plot", metavar="FILE.png", help="picture of the classes (needs ood-mofe[plot])")
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line, or 'imagenet'")
    parser.set_defaults(template=None)
    add_reading_arguments(parser, backbone="tiny")


def _add_reproduction_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", metavar="DIR", required=True, help="the folder with all data sets")
    parser.add_argument(
        "--protocol",
        help="imagenet-1k, imagenet-100, ... (see README; default: imagenet-1k, of --study pilot also imagenet-o)",
    )
    parser.add_argument(
        "--table", type=int, choices=range(1, 7), help="of the paper (default: that of the protocol, 1 or 2)"
    )
    parser.add_argument(
        "--study", help="pilot, fine_grained, layers, classes, router, reg_on, scores or k instead of a table"
    )
    parser.add_argument(
        "--backbones", metavar="SPEC", nargs="+", help="that --study pilot and --study fine_grained compare"
    )
    parser.add_argument(
        "--fine-classes", metavar="FILE", help="classes of --study fine_grained, one name or WordNet id per line"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="picture of --study fine_grained (needs ood-mofe[plot])")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--set", dest="overrides", metavar="NAME=DIR", action="append", default=[], help="other folder")
    parser.add_argument("--param", metavar="KEY=VALUE", action="append", default=[], help="option of MoFE (see README)")
    parser.add_argument(
        "--convention", choices=("standard", "released", "openood"), default="standard", help="FPR rule"
    )
    parser.add_argument("--keep", action="store_true", help="keep every trained detector with its bank, too")
    parser.add_argument("--dry-run", action="store_true", help="say what is found and what is missing")
    parser.add_argument(
        "--out", metavar="DIR", default="reproduce-mofe", help="figures of every run; finished ones stay"
    )
    add_reading_arguments(parser, backbone="timm:vit_base_patch14_dinov2.lvd142m?img_size=224")
