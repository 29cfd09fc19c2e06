"""The command `ood-hvl`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_hvl import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-hvl` and return its exit code."""
    parser = _parser()
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-hvl",
        description="HVL: hierarchical vision-language out-of-distribution detection for medical images (MICCAI 2025).",
        epilog="The Python module ood_hvl.functional offers split_pyramid, parent_index, adapt, fuse, "
        "patch_probabilities, entropy, keep_mask, pool, log_pool, entropy_gain, pseudo_ood, id_loss, id_loss_from_log, "
        "ood_loss, ood_loss_from_log and combine.",
    )
    parser.add_argument("--version", action="version", version=f"ood-hvl {__version__}")
    return parser
