"""What the commands of all packages share: arguments, sources, detectors, errors and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_core.errors import DataError, OODError, UsageError

if TYPE_CHECKING:
    from ood_core.backbones.base import Backbone
    from ood_core.data.sources import ImageSource
    from ood_core.detectors.base import Detector

__all__ = [
    "add_backbone_arguments",
    "add_extraction_arguments",
    "build_detectors",
    "class_names_of",
    "extraction_options",
    "load_backbone",
    "message",
    "named_sources",
    "print_json",
    "print_table",
    "run",
    "save_detectors",
]


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse, run the chosen command, and turn a user's mistake into one sentence and an exit code.

    Exit codes: 0 ok, 2 usage, 3 bad data, 4 not fitted or not calibrated, 130 interrupted.
    """
    args = parser.parse_args(_with_joined_ranges(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        message("interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; nothing more can be said on stdout
        return 1
    except Exception as error:
        if args.debug or not isinstance(error, OODError | ValueError | TypeError | OSError):
            raise
        message(f"{parser.prog}: {' '.join(str(error).split())}")
        return getattr(error, "exit_code", 3 if isinstance(error, OSError) else 2)
    return 0


def _with_joined_ranges(argv: Sequence[str]) -> list[str]:
    """`--value-range -1000,1000` as one word: argparse takes a word that begins so for an option."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] == "--value-range":
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def add_command(commands: Any, name: str, function: Callable[[Any], None], help: str) -> argparse.ArgumentParser:
    """A subcommand whose `args.command` is `function`."""
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(command=function)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def message(text: str) -> None:
    """One line to the person at the terminal (stderr)."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))  # noqa: T201


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns on stdout that no terminal width breaks."""
    lines = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())  # noqa: T201


def add_backbone_arguments(
    parser: argparse.ArgumentParser, *, default: str | None = "tiny", dtype: str = "auto"
) -> None:
    """--backbone, --device, --dtype."""
    parser.add_argument(
        "--backbone", metavar="SPEC", default=default, help=f"see `ood list` (default: {default or 'tiny'})"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", default=dtype, help=f"auto, float32 or bfloat16 (default: {dtype})")


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    """--cache, --on-error, --batch-size, --workers, --max-pixels, --value-range."""
    parser.add_argument("--cache", metavar="DIR", help="keep features here and use what is there")
    parser.add_argument(
        "--on-error", choices=("raise", "record"), default="raise", help="bad images: stop, or count them and go on"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="larger images are bad (default: 100 million)")
    parser.add_argument(
        "--value-range",
        type=_value_range,
        metavar="LOW,HIGH",
        help="values shown black and white in images of more than 8 bits per sample (default: what the files say)",
    )


def add_detector_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--detector, --classes, --template, --param, --fit and the backbone's."""
    parser.add_argument("--detector", metavar="NAME_OR_DIR", action="extend", nargs="+", required=required, default=[])
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line, or 'imagenet'")
    parser.add_argument("--template", metavar="T", help="prompt with {} for the class name, or the name of a set")
    parser.add_argument(
        "--param", metavar="KEY=VALUE", action="append", default=[], help="option of the detectors that have it"
    )
    parser.add_argument("--fit", metavar="SOURCE", help="labelled ID images for detectors that learn")
    add_backbone_arguments(parser, default=None)
    add_extraction_arguments(parser)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """What `score` of every command takes."""
    parser.add_argument("source", metavar="SOURCE")
    add_detector_arguments(parser)
    parser.add_argument("--out", metavar="FILE.parquet", help="score table to write")
    add_fdr_argument(parser)
    parser.add_argument(
        "--by-class",
        action="store_true",
        help="p-values and decisions by the calibration images of the predicted class, so that rates hold in each",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")


def add_fdr_argument(parser: argparse.ArgumentParser) -> None:
    """--fdr."""
    parser.add_argument(
        "--fdr",
        type=float,
        metavar="SHARE",
        help="name images OOD so that at most this share of them is ID on average, instead of by the threshold",
    )


def add_evaluation_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--id, --ood, --calibrate, --convention, --bootstrap, --seed."""
    parser.add_argument("--id", metavar="SOURCE", required=required, help="ID test images")
    parser.add_argument("--ood", metavar="NAME=SOURCE", action="extend", nargs="+", required=required, default=[])
    parser.add_argument("--calibrate", metavar="SOURCE", help="held-out ID images that set the thresholds")
    parser.add_argument(
        "--convention", choices=("standard", "released", "openood"), default="standard", help="FPR rule"
    )
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="replicates for 95 %% intervals")
    parser.add_argument("--seed", type=int, default=0)


def extraction_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `extract` from the command line."""
    names = ("cache", "on_error", "batch_size", "workers", "max_pixels", "value_range")
    return {name: getattr(args, name) for name in names}


def _value_range(text: str) -> tuple[float, ...]:
    """LOW,HIGH as numbers; whether they are a range is the source's business."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be LOW,HIGH, e.g. 0,4095") from None


def load_backbone(args: argparse.Namespace, spec: str | None = None) -> Backbone:
    """The backbone that the command line asks for."""
    from ood_core.backbones import create_backbone

    return create_backbone(spec or args.backbone or "tiny", device=args.device, dtype=args.dtype)


def named_sources(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=SOURCE arguments as a mapping; a bare SOURCE is named after its last component.

    Raises:
        UsageError: a name given twice.
    """
    named: dict[str, str] = {}
    for pair in pairs:
        name, found, source = pair.partition("=")
        if not found or "/" in name:
            name, source = Path(pair.rpartition(":")[0] or pair).stem, pair
        if name in named:
            raise UsageError(f"Two OOD sets are named {name!r}: write NAME=SOURCE with different names.")
        named[name] = source
    return named


def class_names_of(args: argparse.Namespace, *sources: ImageSource | None) -> list[str] | None:
    """Class names from --classes, else from the labels of the first source that has at least two."""
    from ood_core.prompts import read_class_names

    if args.classes:
        return read_class_names(args.classes)
    # A single folder name ("images") says nothing about the classes, and a softmax over one class is always 1.
    return next((list(s.label_names) for s in sources if s is not None and len(s.label_names) > 1), None)


def build_detectors(args: argparse.Namespace, class_names: list[str] | None) -> dict[str, Detector]:
    """Detectors by name or folder, sharing backbones; saved ones keep theirs unless --backbone is given."""
    from ood_core.detectors import create_detector, detector_class
    from ood_core.detectors.base import Detector

    options = dict(map(parse_param, args.param))
    known = {name for given in args.detector if not _is_saved(given) for name in detector_class(given)._option_names()}
    if unused := sorted(set(options) - known):
        raise UsageError(f"None of the detectors has an option {unused[0]!r}.")
    backbone = cache(partial(load_backbone, args))
    detectors: dict[str, Detector] = {}
    for given in args.detector:
        if _is_saved(given):
            made: Detector = Detector.from_pretrained(given)
            for leaf in made._leaves(made.name).values():  # the members of a fusion may have several backbones
                leaf._set_backbone(backbone(args.backbone or leaf._backbone_record.get("spec", "tiny")))
        else:
            mine = {name: options[name] for name in detector_class(given)._option_names() if name in options}
            shared = backbone(args.backbone or "tiny")
            made = create_detector(given, backbone=shared, class_names=class_names, template=args.template, **mine)
        name = Path(given).resolve().name if made.name in detectors else made.name
        if name in detectors:
            raise UsageError(f"Detector {name!r} is given twice.")
        detectors[name] = made
    return detectors


def _is_saved(given: str) -> bool:
    return (Path(given) / "config.json").is_file()


def parse_param(pair: str) -> tuple[str, Any]:
    """KEY=VALUE as a key and a JSON value, or the text itself."""
    name, found, value = pair.partition("=")
    if not found:
        raise UsageError(f"--param {pair!r} must be KEY=VALUE, e.g. --param k=16.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def save_detectors(detectors: dict[str, Detector], folder: str | Path) -> None:
    """Save one detector into `folder`, several into subfolders of their names."""
    for name, detector in detectors.items():
        detector.save_pretrained(Path(folder) if len(detectors) == 1 else Path(folder) / name)


def check_output(path: str | None, suffix: str) -> None:
    """Refuse an output file of another kind before any work is done."""
    if path and not path.endswith(suffix):
        raise UsageError(f"--out {path!r} must end in {suffix}.")
    if path and Path(path).is_dir():
        raise DataError(f"--out {path!r} is a folder; give a file name.")


def check_rate(fdr: float | None) -> None:
    """Refuse a false discovery rate outside (0, 1) before any work is done."""
    if fdr is not None and not 0 < fdr < 1:
        raise UsageError(f"--fdr {fdr:g} must lie between 0 and 1, e.g. 0.05.")
