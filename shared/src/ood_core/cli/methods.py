"""What the commands of trained methods share: fit, evaluate and explain, and their arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ood_core.cli import commands as core
from ood_core.cli.common import (
    add_backbone_arguments,
    add_evaluation_arguments,
    add_extraction_arguments,
    add_overlap_argument,
    extraction_options,
    load_backbone,
    message,
    named_sources,
    open_given,
    parse_params,
    print_json,
)
from ood_core.errors import MissingDataError

if TYPE_CHECKING:
    from ood_core.data.sources import ImageSource
    from ood_core.detectors.base import Detector
    from ood_core.protocols import FoundSet

__all__ = [
    "add_evaluate_arguments",
    "add_explain_arguments",
    "add_fit_arguments",
    "add_reading_arguments",
    "add_saved_arguments",
    "evaluate_variants",
    "explain_image",
    "fit_detector",
    "new_detector",
    "saved_detector",
    "show_found",
]


def add_fit_arguments(parser: argparse.ArgumentParser, *, seed: int, template: str | None = None) -> None:
    """SOURCE, --out, --seed, --calibrate, --tpr, --classes, --template, --param, and what reads images."""
    parser.add_argument("source", metavar="SOURCE", help="labelled ID images, e.g. one folder per class")
    parser.add_argument("--out", metavar="DIR", required=True, help="where the detector goes")
    parser.add_argument("--seed", type=int, default=seed, help=f"of all that is drawn (default: {seed})")
    parser.add_argument("--calibrate", metavar="SOURCE", help="other ID images that set the threshold")
    add_overlap_argument(parser)
    parser.add_argument("--tpr", type=float, default=0.95, help="share of them to accept (default: 0.95)")
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line, or 'imagenet'")
    parser.add_argument("--template", metavar="T", default=template, help="prompt with {} for the class name")
    parser.add_argument(
        "--param", metavar="KEY=VALUE", action="append", default=[], help="option of the method (see README)"
    )
    add_reading_arguments(parser, backbone="tiny")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """--detector, the sets, --out, and what reads images."""
    add_saved_arguments(parser)
    add_evaluation_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True)


def add_explain_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """IMAGE, --detector, --out, and what reads images."""
    parser.add_argument("image", metavar="IMAGE")
    add_saved_arguments(parser)
    parser.add_argument("--out", metavar="FILE.png", help=f"picture to write (default: IMAGE-{method}.png, beside you)")


def add_saved_arguments(parser: argparse.ArgumentParser) -> None:
    """--detector, and what reads images."""
    parser.add_argument("--detector", metavar="DIR", required=True, help="a detector that `fit` saved")
    add_reading_arguments(parser, backbone=None)


def add_reading_arguments(parser: argparse.ArgumentParser, *, backbone: str | None) -> None:
    """The backbone's and the extraction's arguments, and --json."""
    add_backbone_arguments(parser, default=backbone)
    add_extraction_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


def new_detector(args: argparse.Namespace, method: str, names: list[str] | None, **options: Any) -> Any:
    """A detector as the command line asks for it; --param comes before `options`."""
    from ood_core.detectors import create_detector

    given = parse_params(args.param)
    return create_detector(
        method, backbone=load_backbone(args), class_names=names, template=args.template, **(options | given)
    )


def saved_detector(args: argparse.Namespace, kind: type[Detector]) -> Any:
    """The detector of --detector on the backbone asked for, by default its own."""
    made = kind.from_pretrained(args.detector)
    made.attach(load_backbone(args, args.backbone or made._held.spec, made.precision))
    return made


def fit_detector(args: argparse.Namespace, detector: Any, source: ImageSource, **options: Any) -> None:
    """Train (going on from an earlier run's checkpoint), calibrate if asked, save, and say what happened."""
    from ood_core.evaluation import calibrate_detectors

    checkpoint = Path(args.out) / "checkpoint.safetensors"
    detector.fit(source, checkpoint=checkpoint, **options)
    if args.calibrate:
        known = open_given(args, args.calibrate)
        calibrate_detectors(
            {detector.name: detector},
            known,
            tpr=args.tpr,
            allow_overlap=args.allow_overlap,
            **extraction_options(args),
        )
    if os.environ.get("RANK", "0") != "0":  # every process has the same result: one writes it
        return
    detector.save_pretrained(args.out)
    checkpoint.unlink(missing_ok=True)
    message("Last epoch: " + ", ".join(f"{name} {value:.4g}" for name, value in detector.history[-1].items()))
    if detector.threshold is not None:
        message(f"Scores below {detector.threshold:.9g} are OOD")
    message(f"Saved: {args.out}")
    if args.json:
        print_json({"detector": args.out, "history": detector.history, "threshold": detector.threshold})


def evaluate_variants(args: argparse.Namespace, detectors: Mapping[str, Detector], own: str) -> None:
    """Judge several scores of one trained detector; the accuracy is that of `own`."""
    from ood_core.evaluation import evaluate

    found = evaluate(
        detectors,
        id=open_given(args, args.id),
        ood={name: open_given(args, source) for name, source in named_sources(args.ood).items()},
        calibrate=open_given(args, args.calibrate) if args.calibrate else None,
        allow_overlap=args.allow_overlap,
        convention=args.convention,
        bootstrap=args.bootstrap,
        seed=args.seed,
        out=args.out,
        **extraction_options(args),
    )
    core.show(found, args)
    accuracy = found.results["detectors"][own].get("accuracy")
    if accuracy is not None:
        message(f"ID accuracy {100 * accuracy:.1f} %")
    message(f"Results: {args.out}")


class _Explanation(Protocol):
    @property
    def predicted(self) -> str: ...

    @property
    def score(self) -> float: ...

    @property
    def is_ood(self) -> bool | None: ...

    def draw(self, path: str | Path) -> Path: ...

    def to_dict(self) -> dict[str, Any]: ...


def explain_image(args: argparse.Namespace, look: Callable[[Any], _Explanation], method: str) -> None:
    """Draw one image's explanation, and print its score and decision."""
    from ood_core.data.decode import decode

    if not Path(args.image).is_file():
        raise MissingDataError(f"There is no image {args.image!r}; check the path.")
    found = look(decode(args.image, max_pixels=args.max_pixels, value_range=args.value_range))
    out = args.out or f"{Path(args.image).stem}-{method}.png"
    found.draw(out)
    message(f"Picture: {out}")
    if args.json:
        print_json(found.to_dict())
    else:
        decision = {True: ", OOD", False: ", ID", None: ""}[found.is_ood]
        print(f"{found.predicted}: score {found.score:.9g}{decision}")  # noqa: T201


def show_found(args: argparse.Namespace, rows: Sequence[FoundSet]) -> None:
    """Print what a dry run has found of a benchmark."""
    from ood_core.protocols import describe

    if not args.json:
        print(describe(rows))  # noqa: T201
        return
    print_json(
        [
            {"set": row.name, "path": row.path and str(row.path), "images": row.images}
            | {"expected": row.expected, "error": row.error and str(row.error)}
            for row in rows
        ]
    )
