"""The verbs that every trained method has: fit, score, evaluate and explain."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.cli import commands as core
from ood_core.cli.common import (
    add_class_arguments,
    add_command,
    add_evaluation_arguments,
    add_overlap_argument,
    add_param_argument,
    add_reading_arguments,
    add_score_arguments,
    add_shots_argument,
    default_workers,
    extraction_options,
    given_class_names,
    load_backbone,
    message,
    open_given,
    parse_params,
    print_json,
    training_images,
)
from ood_core.errors import MissingDataError

if TYPE_CHECKING:
    from ood_core.data.sources import ImageSource

__all__ = ["TrainedMethod", "add_saved_arguments", "new_detector", "saved_detector"]


def own_variants(detector: Any) -> Mapping[str, Any]:
    """The scores that one training allows, as the detector itself lists them."""
    return detector.variants()


@dataclass(frozen=True)
class TrainedMethod:
    """The verbs of a method that trains a detector.

    Attributes:
        name: of the detector.
        own: the score of `variants` whose accuracy is told.
        training: says to a person what is trained, of the detector and the images.
        variants: the scores that one training allows.
        seed: that is usual.
    """

    name: str
    own: str
    training: Callable[[Any, ImageSource], str]
    variants: Callable[[Any], Mapping[str, Any]] = own_variants
    seed: int = 0

    # ---- arguments

    def add_fit(self, verbs: Any, help: str, *, shots: bool = False) -> None:
        """SOURCE, --out, --seed, --calibrate, --tpr, --classes, --template, --param, and what reads images."""
        parser = add_command(verbs, "fit", self.fit, help)
        parser.add_argument("source", metavar="SOURCE", help="labelled ID images, e.g. one folder per class")
        parser.add_argument("--out", metavar="DIR", required=True, help="where the detector goes")
        parser.add_argument("--seed", type=int, default=self.seed, help="of all that is drawn (default: %(default)s)")
        parser.add_argument("--calibrate", metavar="SOURCE", help="other ID images that set the threshold")
        add_overlap_argument(parser)
        parser.add_argument("--tpr", type=float, default=0.95, help="share of them to accept (default: 0.95)")
        add_class_arguments(parser)
        add_param_argument(parser)
        if shots:
            add_shots_argument(parser)
        add_reading_arguments(parser, backbone="tiny")
        parser.set_defaults(workers=default_workers())

    def add_score(self, verbs: Any) -> None:
        """As `ood score`."""
        add_score_arguments(add_command(verbs, "score", core.score, "score images with a saved detector"))

    def add_evaluate(self, verbs: Any, help: str) -> None:
        """--detector, the sets, --out, and what reads images."""
        parser = add_command(verbs, "evaluate", self.evaluate, help)
        add_saved_arguments(parser)
        add_evaluation_arguments(parser)
        parser.add_argument("--out", metavar="DIR", required=True)

    def add_explain(self, verbs: Any, help: str) -> argparse.ArgumentParser:
        """IMAGE, --detector, --out, and what reads images."""
        parser = add_command(verbs, "explain", self.explain, help)
        parser.add_argument("image", metavar="IMAGE")
        add_saved_arguments(parser)
        parser.add_argument(
            "--out", metavar="FILE.png", help=f"picture to write (default: IMAGE-{self.name}.png, beside you)"
        )
        parser.set_defaults(explain_options=())
        return parser

    # ---- what they do

    def fit(self, args: argparse.Namespace) -> None:
        """Train on labelled images, calibrate if asked, save."""
        source = open_given(args, args.source)
        detector = new_detector(args, self.name, source, seed=args.seed)
        source = training_images(args, source)
        message(self.training(detector, source))
        _fit(args, detector, source)

    def evaluate(self, args: argparse.Namespace) -> None:
        """Judge all scores of one trained detector."""
        detectors = self.variants(saved_detector(args, self.name))
        found = core.judge(args, detectors, **core.given_sets(args))
        core.show(found, args)
        accuracy = found.results["detectors"][self.own].get("accuracy")
        if accuracy is not None:
            message(f"ID accuracy {100 * accuracy:.1f} %")
        message(f"Results: {args.out}")

    def explain(self, args: argparse.Namespace) -> None:
        """Draw one image's explanation, and print its score and decision."""
        from ood_core.data.decode import decode

        if not Path(args.image).is_file():
            raise MissingDataError(f"There is no image {args.image!r}; check the path.")
        detector = saved_detector(args, self.name)
        look = import_module(f"{type(detector).__module__.partition('.')[0]}.explain").explain
        image = decode(args.image, max_pixels=args.max_pixels, value_range=args.value_range)
        found = look(detector, image, **{name: getattr(args, name) for name in args.explain_options})
        out = args.out or f"{Path(args.image).stem}-{self.name}.png"
        found.draw(out)
        message(f"Picture: {out}")
        if args.json:
            print_json(found.to_dict())
        else:
            decision = {True: ", OOD", False: ", ID", None: ""}[found.is_ood]
            print(f"{found.predicted}: score {found.score:.9g}{decision}")  # noqa: T201


def add_saved_arguments(parser: argparse.ArgumentParser) -> None:
    """--detector, and what reads images."""
    parser.add_argument("--detector", metavar="DIR", required=True, help="a detector that `fit` saved")
    add_reading_arguments(parser, backbone=None)


def new_detector(args: argparse.Namespace, method: str, source: ImageSource, **options: Any) -> Any:
    """A detector as the command line asks for it, of the classes of --classes or of `source`.

    --param comes before `options`.
    """
    from ood_core.detectors import create_detector

    names = given_class_names(args) or list(source.label_names)
    given = options | parse_params(args.param)
    return create_detector(method, backbone=load_backbone(args), class_names=names, template=args.template, **given)


def saved_detector(args: argparse.Namespace, method: str) -> Any:
    """The detector of --detector on the backbone asked for, by default its own."""
    from ood_core.detectors import detector_class

    made = detector_class(method).from_pretrained(args.detector)
    made.attach(load_backbone(args, args.backbone or made._held.spec, made.precision))
    return made


def _fit(args: argparse.Namespace, detector: Any, source: ImageSource) -> None:
    """Train (going on from an earlier run's checkpoint), calibrate if asked, save, and say what happened."""
    from ood_core.evaluation import calibrate_detectors

    checkpoint = Path(args.out) / "checkpoint.safetensors"
    detector.fit(source, checkpoint=checkpoint, cache=args.cache, workers=args.workers)
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
