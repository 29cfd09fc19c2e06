"""The command `ood-hvl`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_core.cli.common import command_parser, run
from ood_core.cli.methods import TrainedMethod
from ood_core.reproduction.command import add_reproduce

from ood_hvl import __version__

__all__ = ["main"]

_METHOD = TrainedMethod(
    "hvl",
    own="hvl",
    training=lambda detector, source: (
        f"Encoding {len(source)} images of {len(detector.class_names)} classes at three scales, then training"
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-hvl` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser, verbs = command_parser(
        "ood-hvl",
        f"ood-hvl {__version__}",
        "HVL: hierarchical vision-language out-of-distribution detection for medical images (MICCAI 2025).",
    )
    _METHOD.add_fit(verbs, "train on labelled images of known diseases and save the detector")
    _METHOD.add_score(verbs)
    _METHOD.add_evaluate(verbs, "judge a saved detector, with both means over tiles")
    _METHOD.add_explain(verbs, "draw the regions of an image that mattered")
    _add_reproduce(verbs)
    return parser


def _add_reproduce(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_reproduce(
        verbs,
        "ood_hvl",
        "run a benchmark of the paper on your data, beside what was published",
        seeds=(0, 1, 2),
        backbone="open_clip:ViT-B-16/openai",
    )
    parser.add_argument("--protocol", required=True, help="isic-4, skin-40 or nct-crc")
    parser.add_argument(
        "--folds", choices=("grouped", "stratified"), default="grouped", help="isic-4: by lesion, or as in the paper"
    )
    parser.add_argument(
        "--ood-triples", nargs="+", metavar="A,B,C", help="nct-crc: unknown tissues of each task (see README)"
    )
    parser.add_argument("--study", help="parts (Table 2), k, n (Fig. 2) or epochs instead of the main table")
