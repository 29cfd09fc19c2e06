"""The command `ood-mofe`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ood_mofe import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ood-mofe` and return its exit code."""
    parser = _parser()
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-mofe",
        description="MoFE: mixture of feature experts and Dynamic-beta Mixup for out-of-distribution "
        "detection (ICCV 2025).",
        epilog="The Python module ood_mofe.functional offers route, routing_loss, expert_class_token, expert_tokens, "
        "expert_loss, wordnet_groups, partition_classes, cluster_classes, beta_concentration, fold_lambda, "
        "draw_partners, mixup, mos, atd and ctw.",
    )
    parser.add_argument("--version", action="version", version=f"ood-mofe {__version__}")
    return parser
