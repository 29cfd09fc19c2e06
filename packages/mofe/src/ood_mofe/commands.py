"""What the verbs of `ood-mofe` do."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.cli import commands as core
from ood_core.cli.common import given_class_names, message, open_given, print_json
from ood_core.cli.methods import evaluate_variants, explain_image, fit_detector, new_detector, saved_detector

if TYPE_CHECKING:
    from torch import Tensor

    from ood_mofe.detectors import MoFE

__all__ = ["evaluate", "explain", "fit", "partition", "reproduce", "score"]

score = core.score


def partition(args: argparse.Namespace) -> None:
    """Divide the classes among experts, print the groups, and keep and draw them if asked."""
    from ood_core.cli.common import check_output

    check_output(args.out, ".csv")
    source = open_given(args, args.source)
    detector = new_detector(
        args, "mofe", _class_names(args, source), **({"groups": args.groups} if args.groups else {})
    )
    message(f"Looking at {len(source)} images of {len(detector.class_names)} classes")
    prototypes, group = _divided(detector, source, args.cache)
    if args.plot:
        from ood_mofe.plot import draw

        draw(prototypes, group, detector.class_names, args.plot)
        message(f"Picture: {args.plot}")
    if args.out:
        _write_groups(Path(args.out), detector.class_names, group)
        message(f"For `ood-mofe fit --param groups={args.out} --param experts={int(group.max()) + 1}`: {args.out}")
    _show_groups(args, detector.class_names, group)


def fit(args: argparse.Namespace) -> None:
    """Train on labelled images, calibrate if asked, save."""
    source = open_given(args, args.source)
    detector = new_detector(args, "mofe", _class_names(args, source), seed=args.seed)
    message(
        f"Training {detector.mixture.experts} experts on {len(source)} images of {len(detector.class_names)} classes"
    )
    fit_detector(args, detector, source, cache=args.cache, workers=args.workers)


def evaluate(args: argparse.Namespace) -> None:
    """Judge all scores of a trained detector."""
    from ood_mofe.detectors import MoFE
    from ood_mofe.runner import variants

    evaluate_variants(args, variants(saved_detector(args, MoFE)), "knn")


def explain(args: argparse.Namespace) -> None:
    """Draw one image with its expert, its nearest training images and its distance."""
    from ood_mofe.detectors import MoFE
    from ood_mofe.explain import explain as look

    explain_image(args, partial(look, saved_detector(args, MoFE), train=args.train), "mofe")


def reproduce(args: argparse.Namespace) -> None:
    """Run a table or a study of the paper, our numbers beside the published ones."""
    from ood_mofe.reproduce import reproduce as run

    run(args)


# ---- parts


def _class_names(args: argparse.Namespace, source: Any) -> list[str]:
    return given_class_names(args) or list(source.label_names)


def _divided(detector: MoFE, source: Any, cache: str | None) -> tuple[Tensor, Tensor]:
    """Prototypes [C, D] and groups [C], as `fit` finds them."""
    from ood_mofe.runner import check_groups
    from ood_mofe.training import Split

    check_groups(detector)
    split = Split.of(source, detector._labels(source), detector.training.validation)
    found = detector._survey(split, cache=cache)
    return found.prototypes, detector._groups(found.prototypes)


def _members(class_names: Sequence[str], group: Tensor) -> list[list[str]]:
    every = range(int(group.max()) + 1)
    return [[name for name, own in zip(class_names, group.tolist(), strict=True) if own == number] for number in every]


def _write_groups(path: Path, class_names: Sequence[str], group: Tensor) -> None:
    """Numbers of equal length: `fit` takes groups in the order of their names."""
    from ood_core.files import write_atomically

    digits, table = len(str(int(group.max()))), io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["class", "group"])
    rows.writerows([name, f"{number:0{digits}d}"] for name, number in zip(class_names, group.tolist(), strict=True))
    write_atomically(path, lambda temporary: temporary.write_text(table.getvalue(), encoding="utf-8"))


def _show_groups(args: argparse.Namespace, class_names: Sequence[str], group: Tensor) -> None:
    groups = _members(class_names, group)
    if args.json:
        print_json({"experts": len(groups), "groups": groups, "out": args.out, "plot": args.plot})
        return
    for number, names in enumerate(groups):
        print(f"group {number}, {len(names)} classes: {', '.join(names)}")  # noqa: T201
