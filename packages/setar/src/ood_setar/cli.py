"""The command `ood-setar`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_setar import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-setar` and return its exit code."""
    parser = _parser()
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-setar",
        description="SeTAR: selective low-rank approximation of weights for out-of-distribution detection "
        "(NeurIPS 2024).",
        epilog="The Python module ood_setar.functional offers dropped_rank, truncate and split_low_rank.",
    )
    parser.add_argument("--version", action="version", version=f"ood-setar {__version__}")
    return parser
