"""What the verbs of `ood-hvl` do."""

from __future__ import annotations

import argparse
from functools import partial

from ood_core.cli import commands as core
from ood_core.cli.common import given_class_names, message, open_given
from ood_core.cli.methods import evaluate_variants, explain_image, fit_detector, new_detector, saved_detector

__all__ = ["evaluate", "explain", "fit", "reproduce", "score"]

score = core.score


def fit(args: argparse.Namespace) -> None:
    """Train on labelled images, calibrate if asked, save."""
    source = open_given(args, args.source)
    names = given_class_names(args) or list(source.label_names)
    detector = new_detector(args, "hvl", names, seed=args.seed)
    message(f"Encoding {len(source)} images of {len(names)} classes at three scales, then training")
    fit_detector(args, detector, source, cache=args.cache, workers=args.workers)


def evaluate(args: argparse.Namespace) -> None:
    """Judge a trained detector, with both means over tiles."""
    from ood_hvl.detectors import HVL

    evaluate_variants(args, saved_detector(args, HVL).variants(), "hvl")


def explain(args: argparse.Namespace) -> None:
    """Draw one image with the tiles that mattered."""
    from ood_hvl.detectors import HVL
    from ood_hvl.explain import explain as look

    explain_image(args, partial(look, saved_detector(args, HVL)), "hvl")


def reproduce(args: argparse.Namespace) -> None:
    """Run a benchmark or a study of the paper, our numbers beside the published ones."""
    from ood_hvl.reproduce import reproduce as run

    run(args)
