"""The command `ood-iim`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_core.cli.common import (
    add_backbone_arguments,
    add_command,
    add_evaluation_arguments,
    add_extraction_arguments,
    add_score_arguments,
    run,
)

from ood_iim import __version__, commands

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-iim` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-iim",
        description="Intra-image mining and S-MCM: out-of-distribution detection with CLIP-like models from a few "
        "labelled images (AAAI 2026). A SOURCE is a folder of images, a manifest (csv, tsv, jsonl or parquet with a "
        "column path) or FILE.parquet[:split].",
    )
    parser.add_argument("--version", action="version", version=f"ood-iim {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    fit = add_command(verbs, "fit", commands.fit, "learn prompts from a few labelled images and save the detector")
    fit.add_argument("source", metavar="SOURCE", help="labelled ID images, e.g. one folder per class")
    fit.add_argument("--out", metavar="DIR", required=True, help="where the detector goes")
    fit.add_argument("--shots", type=int, metavar="N", help="images per class, drawn with --seed (default: all)")
    fit.add_argument("--seed", type=int, default=1, help="of the draw, the start and the order (default: 1)")
    fit.add_argument("--calibrate", metavar="SOURCE", help="other ID images that set the threshold")
    fit.add_argument("--tpr", type=float, default=0.95, help="share of them to accept (default: 0.95)")
    _add_training_arguments(fit)

    score = add_command(verbs, "score", commands.score, "score images with a saved detector")
    add_score_arguments(score)

    evaluate = add_command(verbs, "evaluate", commands.evaluate, "judge the six scores of a saved detector")
    _add_detector_argument(evaluate)
    add_evaluation_arguments(evaluate)
    evaluate.add_argument("--out", metavar="DIR", required=True)
    _add_reading_arguments(evaluate)

    explain = add_command(verbs, "explain", commands.explain, "draw which patches speak for and against an image")
    explain.add_argument("image", metavar="IMAGE")
    _add_detector_argument(explain)
    explain.add_argument("--out", metavar="FILE.png", help="picture to write (default: IMAGE-iim.png, beside you)")
    _add_reading_arguments(explain)

    sweep = add_command(verbs, "sweep", commands.sweep, "try k, alpha, temperature and negatives from one pass")
    _add_detector_argument(sweep)
    sweep.add_argument("--id", metavar="SOURCE", required=True, help="ID images, labelled for the accuracy")
    sweep.add_argument("--ood", metavar="NAME=SOURCE", action="extend", nargs="+", default=[], help="OOD test sets")
    sweep.add_argument("--validation", metavar="SOURCE", help="OOD images to choose by; test sets are not used for it")
    sweep.add_argument("--k", type=int, nargs="+", metavar="K", help="default: 1, 2, 5, 10, ... up to the patches")
    sweep.add_argument("--alpha", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5], metavar="A")
    sweep.add_argument("--temperature", type=float, nargs="+", default=[1.0], metavar="T")
    _add_reading_arguments(sweep)

    importing = add_command(
        verbs, "import", commands.import_released, "turn a checkpoint of the released code into ours"
    )
    importing.add_argument("checkpoint", metavar="FILE", help="prompt_learner/model.pth.tar-50")
    importing.add_argument("--classes", metavar="FILE", required=True, help="names in label order, or 'imagenet'")
    importing.add_argument("--out", metavar="DIR", required=True)
    add_backbone_arguments(importing, default="open_clip:ViT-B-16/openai")

    reproduce = add_command(
        verbs, "reproduce", commands.reproduce, "run the paper's protocols on your data, beside its table"
    )
    reproduce.add_argument("--root", metavar="DIR", required=True, help="data as the official code expects it")
    reproduce.add_argument("--protocol", default="imagenet-1k", help="imagenet-1k, imagenet-500-easy, ... (see README)")
    reproduce.add_argument("--shots", type=int, nargs="+", default=[4], metavar="N")
    reproduce.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="S")
    reproduce.add_argument("--study", help="losses, weights, k, scores or prototypes instead of the main table")
    reproduce.add_argument(
        "--set", dest="overrides", metavar="NAME=DIR", action="append", default=[], help="other folder"
    )
    reproduce.add_argument("--dry-run", action="store_true", help="say what is found and what is missing")
    reproduce.add_argument(
        "--out", metavar="DIR", default="reproduce-iim", help="results of every run; finished ones stay"
    )
    _add_training_arguments(reproduce, default="open_clip:ViT-B-16/openai")
    return parser


def _add_training_arguments(parser: argparse.ArgumentParser, *, default: str = "tiny") -> None:
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line, or 'imagenet'")
    parser.add_argument("--template", metavar="T", help="prompt of the global term (default: 'a photo of a {}.')")
    parser.add_argument("--param", metavar="KEY=VALUE", action="append", default=[], help="option of IIM (see README)")
    add_backbone_arguments(parser, default=default)
    add_extraction_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


def _add_detector_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detector", metavar="DIR", required=True, help="a detector that `ood-iim fit` saved")


def _add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_arguments(parser, default=None)
    add_extraction_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")
