"""Checkpoints of the released IIM code, read without running anything in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ood_core.errors import DataError, MissingDataError
from torch import Tensor

__all__ = ["released_tensors"]

_RELEASED = {
    "context": ("prompt_learner.local_ctx", 3),
    "negative_context": ("prompt_learner.neg_ctx", 3),
    "text_projection": ("text_encoder.text_projection", 2),
}
"""Our name -> theirs and the number of dimensions."""

# The released code saves its schedule with its optimiser as objects beside the tensors, which PyTorch does not read
# by itself. They are rebuilt from plain values, without code from the file, and dropped.
_HARMLESS: list[Any] = [
    torch.optim.lr_scheduler.CosineAnnealingLR,
    torch.optim.SGD,
    (lambda *default: {}, "collections.defaultdict"),
    (dict, "builtins.dict"),
]


def released_tensors(path: Path) -> dict[str, Tensor]:
    """The learned tensors of a `model.pth.tar-50`, by our names.

    Raises:
        MissingDataError: no such file.
        DataError: a file without the three learned tensors, or one with objects that code of its own would make.
    """
    if not path.is_file():
        raise MissingDataError(
            f"There is no checkpoint {path}: the released code writes prompt_learner/model.pth.tar-50."
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = " ".join(reason.partition(". ")[0].split())
        raise DataError(f"{path} is no checkpoint of tensors only ({type(error).__name__}: {reason}).") from error
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    for key, dimensions in _RELEASED.values():
        if not isinstance(state.get(key), Tensor) or state[key].ndim != dimensions:
            raise DataError(
                f"{path} is no checkpoint of the released IIM code: it has no {key!r} of {dimensions} dimensions."
            )
    return {name: state[key].float() for name, (key, _) in _RELEASED.items()}
