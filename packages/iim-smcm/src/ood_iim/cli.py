"""The command `ood-iim`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_iim import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-iim` and return its exit code."""
    parser = _parser()
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-iim",
        description="S-MCM and intra-image mining: out-of-distribution detection with CLIP-like models (AAAI 2026).",
        epilog="The detector is used through the command ood, e.g. ood score SOURCE --detector s_mcm "
        "--classes FILE. The Python module ood_iim.functional offers s_mcm, id_logits and diversity_loss.",
    )
    parser.add_argument("--version", action="version", version=f"ood-iim {__version__}")
    return parser
