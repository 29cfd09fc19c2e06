"""Selective low-rank approximation (SeTAR) of a network's weights.

SeTAR makes a pretrained model's ordinary scores separate out-of-distribution images better by dropping the smallest
singular values of some weights, chosen by a search on labelled ID images; SeTAR+FT trains the dropped directions.
`functional` holds the equations; `search.search` and `finetune.finetune` make a `SeTAREdit`, which any detector's
backbone can carry.

Li, Xiong, Chen & Chen, "SeTAR: out-of-distribution detection with selective low-rank approximation", NeurIPS
2024.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_setar import functional
    from ood_setar.detectors import SeTAR
    from ood_setar.edit import SeTAREdit

__version__ = "0.1.0"

_HOMES = {"SeTAR": "detectors", "SeTAREdit": "edit"}
__all__ = ["SeTAR", "SeTAREdit", "functional"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("ood_setar.functional")
    if name in _HOMES:
        return getattr(import_module(f"ood_setar.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ood_setar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
