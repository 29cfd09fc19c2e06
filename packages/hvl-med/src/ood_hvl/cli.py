"""The command `ood-hvl`."""

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

from ood_hvl import __version__, commands

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-hvl` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-hvl",
        description="HVL: hierarchical vision-language out-of-distribution detection for medical images (MICCAI 2025). "
        "A SOURCE is a folder of images, a manifest (csv, tsv, jsonl, txt or parquet with a column path) or "
        "FILE.parquet[:split].",
    )
    parser.add_argument("--version", action="version", version=f"ood-hvl {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    fit = add_command(verbs, "fit", commands.fit, "train on labelled images of known diseases and save the detector")
    add_fit_arguments(fit, seed=0)

    score = add_command(verbs, "score", commands.score, "score images with a saved detector")
    add_score_arguments(score)

    evaluate = add_command(verbs, "evaluate", commands.evaluate, "judge a saved detector, with both means over tiles")
    add_evaluate_arguments(evaluate)

    explain = add_command(verbs, "explain", commands.explain, "draw the regions of an image that mattered")
    add_explain_arguments(explain, "hvl")

    reproduce = add_command(
        verbs, "reproduce", commands.reproduce, "run a benchmark of the paper on your data, beside what was published"
    )
    _add_reproduction_arguments(reproduce)
    for training in (fit, reproduce):
        training.set_defaults(workers=default_workers())
    return parser


def _add_reproduction_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", metavar="DIR", required=True, help="the folder with the data set as published")
    parser.add_argument("--protocol", required=True, help="isic-4, skin-40 or nct-crc")
    parser.add_argument(
        "--folds", choices=("grouped", "stratified"), default="grouped", help="isic-4: by lesion, or as in the paper"
    )
    parser.add_argument(
        "--ood-triples", nargs="+", metavar="A,B,C", help="nct-crc: unknown tissues of each task (see README)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--study", help="parts (Table 2), k, n (Fig. 2) or epochs instead of the main table")
    parser.add_argument("--param", metavar="KEY=VALUE", action="append", default=[], help="option of HVL (see README)")
    parser.add_argument("--dry-run", action="store_true", help="say what is found and what is missing")
    parser.add_argument(
        "--out", metavar="DIR", default="reproduce-hvl", help="figures of every run; finished ones stay"
    )
    add_reading_arguments(parser, backbone="open_clip:ViT-B-16/openai")
