"""The command `ood-mofe`."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.cli.common import (
    add_classes_argument,
    add_command,
    add_convention_argument,
    add_param_argument,
    add_reading_arguments,
    check_output,
    command_parser,
    message,
    open_given,
    print_json,
    run,
)
from ood_core.cli.methods import TrainedMethod, new_detector
from ood_core.reproduction.command import add_reproduce

from ood_mofe import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from ood_mofe.detectors import MoFE

__all__ = ["main"]


def _variants(detector: MoFE) -> Mapping[str, MoFE]:
    from ood_mofe.runner import variants

    return variants(detector)


_METHOD = TrainedMethod(
    "mofe",
    own="knn",
    training=lambda detector, source: (
        f"Training {detector.experts} experts on {len(source)} images of {len(detector.class_names)} classes"
    ),
    variants=_variants,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-mofe` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser, verbs = command_parser(
        "ood-mofe",
        f"ood-mofe {__version__}",
        "MoFE: mixture of feature experts and Dynamic-beta Mixup for out-of-distribution detection (ICCV 2025).",
    )
    _add_partition(verbs)
    _METHOD.add_fit(verbs, "train experts on labelled ID images and save the detector")
    _METHOD.add_score(verbs)
    _METHOD.add_evaluate(verbs, "judge all scores of a saved detector")
    explain = _METHOD.add_explain(verbs, "draw an image's expert, its nearest training images and its distance")
    explain.add_argument("--train", metavar="SOURCE", help="what the detector was fitted on, to show nearest images")
    explain.set_defaults(explain_options=("train",))
    _add_reproduce(verbs)
    return parser


def _add_partition(verbs: Any) -> None:
    parser = add_command(verbs, "partition", partition, "divide the classes among experts, print and plot")
    parser.add_argument("source", metavar="SOURCE", help="labelled ID images, e.g. one folder per class")
    add_param_argument(parser, "option of MoFE such as experts=7 (see README)")
    parser.add_argument("--groups", metavar="FILE", help="csv of class and group, to start from or to look at")
    parser.add_argument("--out", metavar="FILE.csv", help="groups to write, for --param groups= of fit")
    parser.add_argument("--plot", metavar="FILE.png", help="picture of the classes (needs ood-mofe[plot])")
    add_classes_argument(parser)
    parser.set_defaults(template=None)
    add_reading_arguments(parser, backbone="tiny")


def _add_reproduce(verbs: Any) -> None:
    parser = add_reproduce(
        verbs,
        "ood_mofe",
        "run a table of the paper on your data, beside what was published",
        seeds=(0, 1, 2),
        backbone="timm:vit_base_patch14_dinov2.lvd142m?img_size=224",
    )
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
    add_convention_argument(parser)
    parser.add_argument("--keep", action="store_true", help="keep every trained detector with its bank, too")


# ---- partition


def partition(args: argparse.Namespace) -> None:
    """Divide the classes among experts, print the groups, and keep and draw them if asked."""
    check_output(args.out, ".csv")
    source = open_given(args, args.source)
    detector = new_detector(args, "mofe", source, **({"groups": args.groups} if args.groups else {}))
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
