"""The command `ood`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_core import __version__
from ood_core.cli import commands, protocols
from ood_core.cli.common import (
    add_backbone_arguments,
    add_command,
    add_detector_arguments,
    add_device_arguments,
    add_evaluation_arguments,
    add_extraction_arguments,
    add_fdr_argument,
    add_overlap_argument,
    add_score_arguments,
    add_source_arguments,
    command_parser,
    run,
)
from ood_core.cli.protocols import add_protocol_arguments

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood` and return its exit code."""
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser, verbs = command_parser(
        "ood", f"ood-core {__version__}", "Out-of-distribution detection with vision foundation models."
    )

    demo = add_command(verbs, "demo", commands.demo, "write image folders, score them with every detector, report")
    demo.add_argument("--out", metavar="DIR", default="demo", help="folder to write (default: demo)")
    demo.add_argument("--seed", type=int, default=0)
    add_backbone_arguments(demo)
    demo.add_argument("--json", action="store_true", help="print results.json instead of the table")

    listing = add_command(verbs, "list", protocols.list_names, "list detectors and backbones, or protocols")
    listing.add_argument("what", nargs="?", choices=["protocols"], help="protocols: the benchmarks")
    listing.add_argument("--check", action="store_true", help="import every detector: what it needs, or its error")
    listing.add_argument("--json", action="store_true")

    doctor = add_command(
        verbs,
        "doctor",
        commands.doctor,
        "say what is installed and what would help, or what loading a backbone decides",
    )
    doctor.add_argument("spec", metavar="SPEC", nargs="?", help="a backbone to load (see `ood list`)")
    add_device_arguments(doctor)
    doctor.add_argument("--json", action="store_true")

    extract = add_command(verbs, "extract", commands.extract, "compute features once and keep them")
    extract.add_argument("source", metavar="SOURCE")
    extract.add_argument("--needs", default="image,local", help="of image, local, logits (default: image,local)")
    add_backbone_arguments(extract)
    add_extraction_arguments(extract)
    extract.set_defaults(cache_required=True)

    score = add_command(verbs, "score", commands.score, "score images")
    add_score_arguments(score)

    evaluate = add_command(verbs, "evaluate", protocols.evaluate, "judge detectors on ID and OOD sets or a benchmark's")
    add_detector_arguments(evaluate, required=False)
    add_evaluation_arguments(evaluate, required=False)
    evaluate.add_argument("--out", metavar="DIR")
    add_protocol_arguments(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print results.json instead of the table")

    calibrate = add_command(
        verbs, "calibrate", commands.calibrate, "fit if needed, set the threshold, save the detector"
    )
    add_detector_arguments(calibrate)
    calibrate.add_argument("--id", metavar="SOURCE", required=True, help="held-out ID images")
    add_overlap_argument(calibrate)
    calibrate.add_argument("--tpr", type=float, default=0.95, help="share of ID images to accept (default: 0.95)")
    calibrate.add_argument("--out", metavar="DIR", required=True)

    fuse = add_command(
        verbs,
        "fuse",
        commands.fuse,
        "combine score tables, or detectors into one that is calibrated and saved",
    )
    fuse.add_argument("tables", metavar="[NAME=]FILE.parquet", nargs="*", help="score tables, joined by image id")
    fuse.add_argument("--calibration", metavar="[NAME=]FILE.parquet", action="extend", nargs="+", default=[])
    add_detector_arguments(fuse, required=False)
    fuse.add_argument("--id", metavar="SOURCE", help="held-out ID images, for detectors")
    add_overlap_argument(fuse)
    fuse.add_argument("--normalize", default="p_value", help="p_value (default), z_score or robust")
    fuse.add_argument("--combine", default="mean", help="mean (default), max, min, fisher, cauchy or stacking")
    fuse.add_argument("--weight", metavar="NAME=W", action="extend", nargs="+", help="for mean, fisher and cauchy")
    fuse.add_argument(
        "--labelled-ood",
        metavar="SOURCE",
        action="extend",
        nargs="+",
        default=[],
        help="for stacking: score tables, or images, that are known to be OOD; results say so",
    )
    fuse.add_argument("--name", default="fusion", help="of the new column (default: fusion)")
    fuse.add_argument("--tpr", type=float, default=0.95, help="share of ID images to accept (default: 0.95)")
    add_fdr_argument(fuse)
    fuse.add_argument("--out", metavar="FILE.parquet|DIR", help="score table to write; for detectors: folder")
    fuse.add_argument("--json", action="store_true", help="print one JSON list of rows, for score tables")

    report = add_command(
        verbs, "report", commands.report, "write report.html again from results.json and scores.parquet"
    )
    report.add_argument("folder", metavar="DIR")
    report.add_argument("--id", metavar="SOURCE", help="the ID test images, to show some")
    report.add_argument("--ood", metavar="NAME=SOURCE", action="extend", nargs="+", default=[], help="and OOD sets")
    add_source_arguments(report)
    return parser
