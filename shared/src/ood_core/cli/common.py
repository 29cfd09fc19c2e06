"""What the commands of all packages share: arguments, sources, detectors, errors and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
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
    "add_source_arguments",
    "add_workers_argument",
    "build_detectors",
    "class_names_of",
    "default_workers",
    "extraction_options",
    "given_class_names",
    "load_backbone",
    "message",
    "named_sources",
    "open_given",
    "parse_pairs",
    "parse_params",
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
        _check_places(args)
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
    parser.set_defaults(command=function, parser=parser)
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
    lines = [[one_line(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())  # noqa: T201


def one_line(text: str) -> str:
    """A text as a cell of a table: line breaks, tabs and other control characters become escapes.

    Example:
        >>> one_line("new\\nline.png")
        'new\\\\nline.png'
    """
    control = {one for one in text if unicodedata.category(one) in ("Cc", "Zl", "Zp")}
    return text.translate({ord(one): one.encode("unicode_escape").decode() for one in control}) if control else text


def add_backbone_arguments(
    parser: argparse.ArgumentParser, *, default: str | None = "tiny", dtype: str = "auto"
) -> None:
    """--backbone, --device, --dtype."""
    parser.add_argument(
        "--backbone", metavar="SPEC", default=default, help=f"see `ood list` (default: {default or 'tiny'})"
    )
    add_device_arguments(parser, dtype=dtype)


def add_device_arguments(parser: argparse.ArgumentParser, *, dtype: str = "auto") -> None:
    """--device, --dtype."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--dtype",
        default=dtype,
        help=f"auto, float32 (scores do not depend on the batch size) or bfloat16 (default: {dtype}; of a saved "
        "detector the one it was fitted in)",
    )


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    """--cache, --on-error, --batch-size, --workers, and how sources are read."""
    parser.add_argument("--cache", metavar="DIR", help="keep features here and use what is there")
    parser.add_argument(
        "--on-error", choices=("raise", "record"), default="raise", help="bad images: stop, or count them and go on"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    add_workers_argument(parser)
    add_source_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser, *, backbone: str | None, dtype: str = "auto") -> None:
    """The backbone's and the extraction's arguments, and --json."""
    add_backbone_arguments(parser, default=backbone, dtype=dtype)
    add_extraction_arguments(parser)
    add_json_argument(parser)


def add_param_argument(parser: argparse.ArgumentParser, what: str = "option of the method (see README)") -> None:
    """--param."""
    parser.add_argument("--param", metavar="KEY=VALUE", action="append", default=[], help=what)


def add_class_arguments(
    parser: argparse.ArgumentParser, template: str | None = None, usual: str = "the detector's own"
) -> None:
    """--classes and --template."""
    add_classes_argument(parser)
    about = f"prompt with {{}} for the class name, or the name of a set (default: {usual})"
    parser.add_argument("--template", metavar="T", default=template, help=about)


def add_classes_argument(parser: argparse.ArgumentParser) -> None:
    """--classes."""
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line, or 'imagenet'")


def add_convention_argument(parser: argparse.ArgumentParser) -> None:
    """--convention."""
    rules = ("standard", "released", "openood")
    parser.add_argument("--convention", choices=rules, default="standard", help="FPR rule")


def add_shots_argument(parser: argparse.ArgumentParser) -> None:
    """--shots."""
    parser.add_argument("--shots", type=int, metavar="N", help="images per class, drawn with --seed (default: all)")


def training_images(args: argparse.Namespace, source: ImageSource) -> ImageSource:
    """As many images of every class as --shots says; all where it says nothing."""
    from ood_core.data import FewShot

    shots = getattr(args, "shots", None)
    if shots is None:
        return source
    few = FewShot(source, shots, args.seed)
    if few.short_classes:
        message(f"Fewer than {shots} images, all taken: {_listed(few.short_classes)}")
    return few


def _listed(counts: Mapping[str, int], most: int = 5) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:most])
    return shown + (f" and {len(counts) - most} more" if len(counts) > most else "")


def command_parser(prog: str, version: str, description: str) -> tuple[argparse.ArgumentParser, Any]:
    """The parser of a command, and what takes its verbs.

    Args:
        prog: name of the command.
        version: name and version of its package.
        description: what it is for; how a SOURCE is written follows.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"{description} A SOURCE is a folder of images, a manifest (csv, tsv, jsonl, txt or parquet with a "
        "column path) or FILE.parquet[:split].",
    )
    parser.add_argument("--version", action="version", version=version)
    return parser, parser.add_subparsers(metavar="COMMAND", required=True)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


def add_workers_argument(parser: argparse.ArgumentParser, default: int = 0) -> None:
    """--workers."""
    parser.add_argument(
        "--workers", type=int, default=default, metavar="N", help="processes that decode images (default: %(default)s)"
    )


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """How sources are read: --max-pixels, --value-range, --path-column, --label-column, --encoding."""
    parser.add_argument("--max-pixels", type=int, metavar="N", help="larger images are bad (default: 100 million)")
    parser.add_argument(
        "--value-range",
        type=_value_range,
        metavar="LOW,HIGH",
        help="values shown black and white in images of more than 8 bits per sample (default: what the files say)",
    )
    parser.add_argument("--path-column", metavar="NAME", help="column of paths in tables of images (default: path)")
    parser.add_argument("--label-column", metavar="NAME", help="column of labels in these (default: label)")
    parser.add_argument("--encoding", metavar="NAME", help="of tables and --classes, such as latin-1 (default: UTF-8)")


def default_workers() -> int:
    """For commands that decode for hours: a process for each processor, four at most; none beside a single one."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, available) if available > 1 else 0


def add_detector_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--detector, --classes, --template, --param, --fit and the backbone's."""
    parser.add_argument("--detector", metavar="NAME_OR_DIR", action="extend", nargs="+", required=required, default=[])
    add_class_arguments(parser)
    add_param_argument(parser, "option of the detectors that have it")
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


def add_overlap_argument(parser: argparse.ArgumentParser) -> None:
    """--allow-overlap."""
    parser.add_argument(
        "--allow-overlap",
        action="store_true",
        help="calibrate on images that a detector was fitted on, too, though the threshold will be too high",
    )


def add_evaluation_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--id, --ood, --calibrate, --convention, --bootstrap, --seed."""
    parser.add_argument("--id", metavar="SOURCE", required=required, help="ID test images")
    parser.add_argument("--ood", metavar="NAME=SOURCE", action="extend", nargs="+", required=required, default=[])
    parser.add_argument("--calibrate", metavar="SOURCE", help="held-out ID images that set the thresholds")
    add_overlap_argument(parser)
    add_convention_argument(parser)
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


def load_backbone(args: argparse.Namespace, spec: str | None = None, dtype: str = "auto") -> Backbone:
    """The backbone that the command line asks for, by default in the precision `dtype`."""
    from ood_core.backbones import create_backbone

    dtype = dtype if args.dtype == "auto" else args.dtype
    return create_backbone(spec or args.backbone or "tiny", device=args.device, dtype=dtype)


def open_given(args: argparse.Namespace, source: str) -> ImageSource:
    """A source that the command line names, read as the flags of `add_source_arguments` say."""
    from ood_core.data import open_source

    tables = {"path_column": args.path_column, "label": args.label_column, "encoding": args.encoding}
    return open_source(source, max_pixels=args.max_pixels, value_range=args.value_range, **tables)


def parse_pairs(option: str, pairs: Sequence[str], form: str = "NAME=VALUE") -> dict[str, str]:
    """NAME=VALUE arguments as a mapping.

    Args:
        option: of the command line, for errors.
        pairs: what was given.
        form: what it takes, for errors.

    Raises:
        UsageError: an argument of another form, or a name given twice.

    Example:
        >>> parse_pairs("--set", ["SUN=/data/sun"])
        {'SUN': '/data/sun'}
    """
    named = [pair.partition("=")[::2] for pair in pairs]
    if wrong := [pair for pair, parts in zip(pairs, named, strict=True) if not all(parts)]:
        raise UsageError(f"{option} {wrong[0]!r} must be {form}.")
    return _once(option, named)


def _once(option: str, named: Sequence[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in named:
        if name in found:
            raise UsageError(f"{option} names {name!r} twice, as {found[name]!r} and {value!r}: give it once.")
        found[name] = value
    return found


def named_sources(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=SOURCE arguments as a mapping; a bare SOURCE is named after its last component.

    Raises:
        UsageError: a name given twice, or one that results use otherwise.
    """
    named = [
        next(iter(parse_pairs("--ood", [pair], "NAME=SOURCE").items())) if _has_name(pair) else (_stem(pair), pair)
        for pair in pairs
    ]
    sources = _once("--ood", named)
    for name, use in {"id": "the ID test images", "mean": "the mean over the sets"}.items():
        if name in sources:
            raise UsageError(f"An OOD set cannot be named {name!r}, as results call {use}: write NAME=SOURCE.")
    return sources


def _has_name(pair: str) -> bool:
    name, found, _ = pair.partition("=")
    return bool(found) and "/" not in name


def _stem(source: str) -> str:
    return Path(source.rpartition(":")[0] or source).stem


def given_class_names(args: argparse.Namespace) -> list[str] | None:
    """Class names of --classes; None without it."""
    from ood_core.labels import check_class_names
    from ood_core.prompts import read_class_names

    if not args.classes:
        return None
    return check_class_names(
        read_class_names(args.classes, encoding=getattr(args, "encoding", None)), what=args.classes
    )


def class_names_of(
    args: argparse.Namespace, fit: ImageSource | None = None, *, id_test: ImageSource | None = None
) -> list[str] | None:
    """The known classes: those of --classes, else the labels of the images to fit on.

    Args:
        args: of the command line.
        fit: labelled ID images, if given.
        id_test: labelled ID test images of an evaluation, whose labels are known classes by definition; taken last,
            and said. Images that are to be judged ID or OOD never name classes.
    """
    if args.classes:
        return given_class_names(args)
    # A single folder name ("images") says nothing about the classes, and a softmax over one class is always 1.
    if fit is not None and fit.label_names:
        return list(fit.label_names) if len(fit.label_names) > 1 else None
    if id_test is None or len(id_test.label_names) < 2:
        return None
    if not all(map(_is_saved, args.detector)):
        message(
            f"The known classes are the {len(id_test.label_names)} labels of --id; --classes FILE or --fit SOURCE name "
            "others."
        )
    return list(id_test.label_names)


def build_detectors(args: argparse.Namespace, class_names: list[str] | None) -> dict[str, Detector]:
    """Detectors by name or folder, sharing backbones; saved ones keep theirs unless --backbone is given."""
    from ood_core.detectors import create_detector, detector_class, known_options
    from ood_core.detectors.base import Detector, leaves
    from ood_core.options import method_options

    options = parse_params(args.param)
    known = {name for given in args.detector if not _is_saved(given) for name in method_options(detector_class(given))}
    if unused := sorted(set(options) - known):
        raise UsageError(f"None of the detectors has an option {unused[0]!r}.")
    backbone = cache(partial(load_backbone, args))
    detectors: dict[str, Detector] = {}
    for given in args.detector:
        if _is_saved(given):
            made: Detector = Detector.from_pretrained(given)
            for leaf in leaves(made):  # the members of a fusion may have several backbones
                spec = args.backbone or leaf._held.spec
                leaf.attach(backbone(spec, leaf.precision))
        else:
            mine = known_options(given, options)
            shared = backbone(args.backbone or "tiny")
            made = create_detector(given, backbone=shared, class_names=class_names, template=args.template, **mine)
        name = Path(given).resolve().name if made.name in detectors else made.name
        if name in detectors:
            raise UsageError(f"Detector {name!r} is given twice.")
        detectors[name] = made
    return detectors


def _is_saved(given: str) -> bool:
    return (Path(given) / "config.json").is_file()


def parse_params(pairs: Sequence[str]) -> dict[str, Any]:
    """--param KEY=VALUE arguments: JSON values, or the texts themselves; of a key given twice the last counts.

    Raises:
        UsageError: an argument of another form.

    Example:
        >>> parse_params(["k=16", "scorer=gen"])
        {'k': 16, 'scorer': 'gen'}
    """
    return dict(map(parse_param, pairs))


def parse_param(pair: str) -> tuple[str, Any]:
    """One KEY=VALUE of --param (see `parse_params`)."""
    [(name, value)] = parse_pairs("--param", [pair], "KEY=VALUE, e.g. --param k=16").items()
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def save_detectors(detectors: dict[str, Detector], folder: str | Path) -> None:
    """Save one detector into `folder`, several into subfolders of their names."""
    for name, detector in detectors.items():
        detector.save_pretrained(Path(folder) if len(detectors) == 1 else Path(folder) / name)


def _check_places(args: argparse.Namespace) -> None:
    """Refuse an --out or --cache that cannot be written before any work is done."""
    for action in args.parser._actions:
        place = getattr(args, action.dest, None)
        if action.dest not in ("out", "cache") or not place:
            continue
        option, kind = action.option_strings[0], str(action.metavar)
        if kind == "DIR":
            check_folder(option, place)
        elif kind.startswith("FILE.") and "|" not in kind:
            check_file(option, place)


def check_folder(option: str, place: str | Path) -> None:
    """Refuse a folder to write to that is a file, lies below one, or must not be written to."""
    above = next((path for path in (Path(place), *Path(place).absolute().parents) if os.path.lexists(path)), Path())
    if not above.is_dir():
        raise DataError(f"{option} {str(place)!r}: {str(above)!r} is a file; name a folder.")
    if not os.access(above, os.W_OK):
        raise DataError(f"{option} {str(place)!r}: {str(above)!r} must not be written to; name another folder.")


def check_file(option: str, place: str | Path) -> None:
    """Refuse a file to write that is a folder, or in a place that cannot be one."""
    if Path(place).is_dir():
        raise DataError(f"{option} {str(place)!r} is a folder; give a file name.")
    check_folder(option, Path(place).absolute().parent)


def check_output(path: str | None, suffix: str) -> None:
    """Refuse an output file of another kind before any work is done."""
    if path and not path.endswith(suffix):
        raise UsageError(f"--out {path!r} must end in {suffix}.")
    if path:
        check_file("--out", path)


def check_rate(fdr: float | None) -> None:
    """Refuse a false discovery rate outside (0, 1) before any work is done."""
    if fdr is not None and not 0 < fdr < 1:
        raise UsageError(f"--fdr {fdr:g} must lie between 0 and 1, e.g. 0.05.")
