"""The command `ood-iim`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ood_core.cli.common import (
    add_backbone_arguments,
    add_class_arguments,
    add_command,
    add_convention_argument,
    command_parser,
    extraction_options,
    given_class_names,
    load_backbone,
    message,
    named_sources,
    open_given,
    print_json,
    print_table,
    run,
)
from ood_core.cli.methods import TrainedMethod, add_saved_arguments, saved_detector
from ood_core.errors import UsageError
from ood_core.reproduction.command import add_reproduce

from ood_iim import __version__

__all__ = ["main"]

_METHOD = TrainedMethod(
    "iim",
    own="s_mcm",
    training=lambda detector, source: (
        f"Learning {len(detector.class_names)} class prompts and {detector.negative_prompts} negatives from "
        f"{len(source)} images"
    ),
    seed=1,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-iim` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser, verbs = command_parser(
        "ood-iim",
        f"ood-iim {__version__}",
        "Intra-image mining and S-MCM: out-of-distribution detection with CLIP-like models from a few labelled images "
        "(AAAI 2026).",
    )
    _METHOD.add_fit(verbs, "learn prompts from a few labelled images and save the detector", shots=True)
    _METHOD.add_score(verbs)
    _METHOD.add_evaluate(verbs, "judge the six scores of a saved detector")
    _METHOD.add_explain(verbs, "draw which patches speak for and against an image")
    _add_sweep(verbs)
    _add_import(verbs)
    _add_reproduce(verbs)
    return parser


def _add_sweep(verbs: Any) -> None:
    parser = add_command(verbs, "sweep", sweep, "try k, alpha, temperature and negatives from one pass")
    add_saved_arguments(parser)
    parser.add_argument("--id", metavar="SOURCE", required=True, help="ID images, labelled for the accuracy")
    parser.add_argument("--ood", metavar="NAME=SOURCE", action="extend", nargs="+", default=[], help="OOD test sets")
    parser.add_argument("--validation", metavar="SOURCE", help="OOD images to choose by; test sets are not used for it")
    add_convention_argument(parser)
    parser.add_argument("--k", type=int, nargs="+", metavar="K", help="default: 1, 2, 5, 10, ... up to the patches")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5], metavar="A")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0], metavar="T")


def _add_import(verbs: Any) -> None:
    parser = add_command(verbs, "import", import_released, "turn a checkpoint of the released code into ours")
    parser.add_argument("checkpoint", metavar="FILE", help="prompt_learner/model.pth.tar-50")
    parser.add_argument("--classes", metavar="FILE", required=True, help="names in label order, or 'imagenet'")
    parser.add_argument("--out", metavar="DIR", required=True)
    add_backbone_arguments(parser, default="open_clip:ViT-B-16/openai")


def _add_reproduce(verbs: Any) -> None:
    parser = add_reproduce(
        verbs,
        "ood_iim",
        "run the paper's protocols on your data, beside its table",
        seeds=(1, 2, 3),
        backbone="open_clip:ViT-B-16/openai",
        needs_root=False,
    )
    parser.add_argument("--protocol", default="imagenet-1k", help="imagenet-1k, imagenet-500-easy, ... (see README)")
    parser.add_argument("--shots", type=int, nargs="+", default=[4], metavar="N")
    parser.add_argument("--study", help="losses, weights, k, scores or prototypes instead of the main table")
    parser.add_argument(
        "--lists",
        metavar="NAME=FILE",
        nargs="+",
        default=[],
        help="class names that --study prototypes compares, without any images (default: both halves of ImageNet)",
    )
    add_class_arguments(parser, usual="'a photo of a {}.', of the global term")
    parser.add_argument("--no-cache", action="store_true", help="encode test images anew in every trial")


# ---- sweep and import


def sweep(args: argparse.Namespace) -> None:
    """Judge combinations of k, alpha, temperature and negatives."""
    from ood_iim.studies import sweep as run

    tests = {name: open_given(args, source) for name, source in named_sources(args.ood).items()}
    if not tests and not args.validation:
        raise UsageError("Give OOD test sets (--ood NAME=SOURCE), or OOD images to choose by (--validation SOURCE).")
    validation = {"validation": open_given(args, args.validation)} if args.validation else {}
    rows = run(
        saved_detector(args, "iim"),
        id=open_given(args, args.id),
        ood=validation | tests,
        ks=args.k,
        alphas=args.alpha,
        temperatures=args.temperature,
        convention=args.convention,
        **extraction_options(args),
    )
    if validation:
        rows = [_chosen_by_validation(rows)]
        message("Chosen by the AUROC on the validation images; the figures are of the test sets.")
    else:
        message("These are test figures: to choose by OOD images, declare some with --validation.")
    if args.json:
        print_json(rows)
        return
    print_table(
        ["k", "alpha", "T", "negatives", "AUROC", f"FPR95 ({args.convention})"],
        [
            [row["k"], row["alpha"], row["temperature"], row["negatives"], *(_percent(row[m]) for m in _MEASURES)]
            for row in rows
        ],
    )


def _chosen_by_validation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the best validation AUROC, its averages over the test sets alone."""
    best = max(rows, key=lambda row: row["per_set"]["validation"]["auroc"])
    tests = {name: figures for name, figures in best["per_set"].items() if name != "validation"}
    averages = {m: fmean(figures[m] for figures in tests.values()) if tests else None for m in _MEASURES}
    return best | averages | {"per_set": tests, "validation": best["per_set"]["validation"]}


def import_released(args: argparse.Namespace) -> None:
    """Turn a checkpoint of the released code into a saved detector."""
    from ood_iim.detectors import IIM

    names = given_class_names(args) or []
    detector = IIM.from_released(args.checkpoint, backbone=load_backbone(args), class_names=names)
    detector.save_pretrained(args.out)
    message(f"{len(names)} classes, {detector.prompts.negative_prompts} negative prompts. Saved: {args.out}")


_MEASURES = ("auroc", "fpr95")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
