"""The command `ood-hvl`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_core.cli.common import add_command, add_score_arguments, run
from ood_core.cli.methods import add_evaluate_arguments, add_explain_arguments, add_fit_arguments

from ood_hvl import __version__, commands

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-hvl` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-hvl",
        description="HVL: hierarchical vision-language out-of-distribution detection for medical images (MICCAI 2025). "
        "A SOURCE is a folder of images, a manifest (csv, tsv, jsonl or parquet with a column path) or "
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
    return parser
