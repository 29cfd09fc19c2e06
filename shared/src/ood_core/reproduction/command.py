"""The head of every `reproduce` command: its arguments, what a dry run has found, and differences in print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ood_core.cli.common import (
    add_command,
    add_param_argument,
    add_reading_arguments,
    default_workers,
    message,
    print_json,
    print_table,
)
from ood_core.reproduction.tables import Beside, difference_cells, legend

if TYPE_CHECKING:
    from ood_core.protocols import FoundSet

__all__ = ["add_reproduce", "print_differences", "show_found"]


def add_reproduce(
    verbs: Any,
    package: str,
    help: str,
    *,
    seeds: Sequence[int],
    backbone: str,
    dtype: str = "auto",
    needs_root: bool = True,
) -> argparse.ArgumentParser:
    """The verb `reproduce` of a method: --root, --seeds, --set, --param, --dry-run, --out, and what reads images.

    Args:
        verbs: of the method's parser.
        package: of the method, whose module `reproduce` has a function of this name that runs the command.
        help: in a sentence.
        seeds: that are usual.
        backbone: that is usual.
        dtype: that is usual.
        needs_root: whether nothing can be run without data.

    Returns:
        The parser, for the method's own arguments.
    """

    def run(args: argparse.Namespace) -> None:
        import_module(f"{package}.reproduce").reproduce(args)

    parser = add_command(verbs, "reproduce", run, help)
    usual, folder = " ".join(map(str, seeds)), f"reproduce-{package.removeprefix('ood_')}"
    parser.add_argument("--root", metavar="DIR", required=needs_root, help="the folder with all data sets")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(seeds), metavar="S", help=f"of what is trained (default: {usual})"
    )
    several: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--set", dest="overrides", metavar="NAME=DIR", help="other folder of an image set", **several)
    add_param_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what is found and what is missing")
    parser.add_argument("--out", metavar="DIR", default=folder, help="figures of every run; finished ones stay")
    add_reading_arguments(parser, backbone=backbone, dtype=dtype)
    parser.set_defaults(workers=default_workers())
    return parser


def show_found(args: argparse.Namespace, rows: Sequence[FoundSet]) -> None:
    """Print what a dry run has found of a benchmark."""
    from ood_core.protocols import describe

    if args.json:
        print_json([row.to_dict() for row in rows])
    else:
        print(describe(rows))  # noqa: T201


def print_differences(found: Sequence[Beside], places: Sequence[str], measures: Sequence[str]) -> None:
    """Ours minus the published figures, a line per row, and how many are off; nothing where no row has both."""
    if not found:
        return
    have = {(one.place, one.measure) for one in found}
    columns = {place: own for place in places if (own := [one for one in measures if (place, one) in have])}
    rows = {one.row: [other for other in found if other.row == one.row] for one in found}
    print_table(
        ["ours - published, points", *(_column(place, own) for place, own in columns.items())],
        [[name, *(difference_cells(own, [p], m)[0] for p, m in columns.items())] for name, own in rows.items()],
    )
    message(legend(found))


def _column(place: str, measures: Sequence[str]) -> str:
    return place if [place] == list(measures) else f"{place}: {' / '.join(measures)}"
