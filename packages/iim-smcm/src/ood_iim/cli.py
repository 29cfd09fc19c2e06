"""The command `ood-iim`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_core.cli.common import (
    add_backbone_arguments,
    add_command,
    add_score_arguments,
    default_workers,
    run,
)
from ood_core.cli.methods import (
    add_evaluate_arguments,
    add_explain_arguments,
    add_fit_arguments,
    add_reading_arguments,
    add_saved_arguments,
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
        "labelled images (AAAI 2026). A SOURCE is a folder of images, a manifest (csv, tsv, jsonl, txt or parquet with "
        "a column path) or FILE.parquet[:split].",
    )
    parser.add_argument("--version", action="version", version=f"ood-iim {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    fit = add_command(verbs, "fit", commands.fit, "learn prompts from a few labelled images and save the detector")
    add_fit_arguments(fit, seed=1)
    fit.add_argument("--shots", type=int, metavar="N", help="images per class, drawn with --seed (default: all)")

    score = add_command(verbs, "score", commands.score, "score images with a saved detector")
    add_score_arguments(score)

    evaluate = add_command(verbs, "evaluate", commands.evaluate, "judge the six scores of a saved detector")
    add_evaluate_arguments(evaluate)

    explain = add_command(verbs, "explain", commands.explain, "draw which patches speak for and against an image")
    add_explain_arguments(explain, "iim")

    sweep = add_command(verbs, "sweep", commands.sweep, "try k, alpha, temperature and negatives from one pass")
    add_saved_arguments(sweep)
    sweep.add_argument("--id", metavar="SOURCE", required=True, help="ID images, labelled for the accuracy")
    sweep.add_argument("--ood", metavar="NAME=SOURCE", action="extend", nargs="+", default=[], help="OOD test sets")
    sweep.add_argument("--validation", metavar="SOURCE", help="OOD images to choose by; test sets are not used for it")
    sweep.add_argument("--convention", choices=("standard", "released", "openood"), default="standard", help="FPR rule")
    sweep.add_argument("--k", type=int, nargs="+", metavar="K", help="default: 1, 2, 5, 10, ... up to the patches")
    sweep.add_argument("--alpha", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5], metavar="A")
    sweep.add_argument("--temperature", type=float, nargs="+", default=[1.0], metavar="T")

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
    reproduce.add_argument("--root", metavar="DIR", help="data as the official code expects it")
    reproduce.add_argument("--protocol", default="imagenet-1k", help="imagenet-1k, imagenet-500-easy, ... (see README)")
    reproduce.add_argument("--shots", type=int, nargs="+", default=[4], metavar="N")
    reproduce.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="S")
    reproduce.add_argument("--study", help="losses, weights, k, scores or prototypes instead of the main table")
    reproduce.add_argument(
        "--lists",
        metavar="NAME=FILE",
        nargs="+",
        default=[],
        help="class names that --study prototypes compares, without any images (default: both halves of ImageNet)",
    )
    reproduce.add_argument(
        "--set", dest="overrides", metavar="NAME=DIR", action="append", default=[], help="other folder"
    )
    reproduce.add_argument("--dry-run", action="store_true", help="say what is found and what is missing")
    reproduce.add_argument(
        "--out", metavar="DIR", default="reproduce-iim", help="results of every run; finished ones stay"
    )
    reproduce.add_argument("--classes", metavar="FILE", help="class names, one per line, or 'imagenet'")
    reproduce.add_argument("--template", metavar="T", help="prompt of the global term (default: 'a photo of a {}.')")
    reproduce.add_argument(
        "--param", metavar="KEY=VALUE", action="append", default=[], help="option of IIM (see README)"
    )
    reproduce.add_argument("--no-cache", action="store_true", help="encode test images anew in every trial")
    add_reading_arguments(reproduce, backbone="open_clip:ViT-B-16/openai")
    for training in (fit, reproduce):
        training.set_defaults(workers=default_workers())
    return parser
