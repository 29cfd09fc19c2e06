"""Backbones: pre-trained vision (and language) models behind one interface."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ood_core.backbones.specs import located
from ood_core.errors import MissingDataError, UsageError, unknown_name
from ood_core.registry import BACKBONES, EDITS

if TYPE_CHECKING:  # names are listed without loading torch
    import torch

    from ood_core.backbones.base import Backbone, Decision

__all__ = ["create_backbone", "list_backbones"]


def list_backbones() -> list[str]:
    """Specs to start from; NAME stands for any model of that library.

    Example:
        >>> list_backbones()[0]
        'tiny'
    """
    return [
        "tiny",
        "open_clip:ViT-B-16/openai",
        "open_clip:NAME/TAG",
        "open_clip:NAME/FILE",
        "open_clip:local-dir:FOLDER",
        "timm:vit_base_patch14_dinov2.lvd142m",
        "timm:NAME",
        "timm:NAME/FILE",
        "hf:openai/clip-vit-base-patch16",
        "hf:NAME_OR_FOLDER",
        *(f"{library}:NAME" for library in BACKBONES.names() if library not in _OWN),
    ]


_OWN = ("hf", "open_clip", "timm", "tiny")


def create_backbone(
    spec: str, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto", edit: str | None = None
) -> Backbone:
    """Load a backbone.

    Args:
        spec: "tiny" (embedded, needs no network), "open_clip:ARCHITECTURE/TAG", "open_clip:ARCHITECTURE/FILE",
            "open_clip:ARCHITECTURE" (random weights), "open_clip:local-dir:FOLDER", "timm:NAME.TAG", "timm:NAME/FILE",
            "timm:NAME" (random weights), "hf:NAME_OR_FOLDER"; any of them with "+edit:FOLDER" behind it, which is the
            same as `edit=FOLDER`. Paths in it are made absolute, so that what is saved with it works from any folder.
        device: where it runs: "cpu", "cuda", "cuda:1", "mps", "xpu".
        dtype: precision of the weights: "auto" (what the environment variable OOD_DTYPE names; without it bfloat16
            on GPUs and on CPUs with bfloat16 instructions, float32 elsewhere), "float32", "bfloat16", "float16" or a
            torch dtype. Results are float32 in any case.
        edit: folder of a saved SeTAR edit to apply (needs `ood-setar`).

    Returns:
        The backbone, frozen and in evaluation mode.

    Raises:
        UsageError: an unknown library, model or dtype, or a device that is not there.
        MissingDataError: weights that cannot be had.

    Example:
        >>> create_backbone("tiny").grid
        (8, 8)
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string such as 'tiny', got {spec!r}.")
    spec, _, named_edit = spec.partition("+edit:")
    edit = edit or named_edit or None
    library, _, name = spec.partition(":")
    if library not in BACKBONES.entries or (library == "tiny") == bool(name):
        raise unknown_name("backbone", spec, list_backbones())
    device = _resolve_device(device)
    precision = resolve_dtype(dtype, device)
    spec = located(spec)
    backbone: Backbone = BACKBONES.load(library)(spec.partition(":")[2], spec=spec)
    if edit is not None:
        edit = os.path.abspath(Path(edit).expanduser())
        backbone = _apply_edit(backbone, edit)
    backbone.model.to(device=device, dtype=precision)
    backbone.decisions = (*backbone.decisions, *_placed(backbone, dtype, edit))
    return backbone


def _placed(backbone: Backbone, dtype: str | torch.dtype, edit: str | None) -> tuple[Decision, ...]:
    from ood_core.backbones.base import Decision

    source = "the hardware" if dtype == "auto" else "the argument"
    if dtype == "auto" and os.environ.get("OOD_DTYPE", "auto") != "auto":
        source = "the environment variable OOD_DTYPE"
    return (
        Decision("device", str(backbone.device), "the argument"),
        Decision("precision", backbone.precision, source),
        Decision("edit", edit or "none", "the argument"),
    )


def _resolve_device(device: str | torch.device) -> torch.device:
    import torch

    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"Unknown device {device!r}: use 'cpu', 'cuda', 'cuda:1', 'mps' or 'xpu'.") from error
    if resolved.type == "cuda" and resolved.index is None and "LOCAL_RANK" in os.environ:
        # Launchers number the processes of a machine; each takes a device of its own.
        resolved = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if resolved.type == "meta":
        raise UsageError("Device 'meta' holds shapes without numbers, so nothing can be scored there: use 'cpu'.")
    if resolved.type != "cpu" and (resolved.index or 0) >= (count := _device_count(resolved.type)):
        raise UsageError(f"Device {device!r} is not there ({count} {resolved.type.upper()} devices found): use 'cpu'.")
    return resolved


def _device_count(kind: str) -> int:
    """Devices of a kind on this machine; 0 of kinds that cannot compute or that this PyTorch does not know."""
    import torch

    count = getattr(getattr(torch, kind, None), "device_count", None)
    return int(count()) if count is not None else 0


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    import torch

    from ood_core.devices import cpu_has_bfloat16

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        dtype = os.environ.get("OOD_DTYPE", "auto")
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype != "auto" and dtype not in named:
        raise unknown_name("dtype", dtype, ["auto", *named])
    if dtype != "auto":
        return named[dtype]
    fast = device.type != "cpu" or cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _apply_edit(backbone: Backbone, folder: str) -> Backbone:
    file = Path(folder) / "edit.json"
    if not file.is_file():
        raise MissingDataError(f"{folder} holds no saved edit: edit.json is missing.")
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["kind"]
    except (ValueError, KeyError, TypeError):
        kind = "setar"  # written before there were others, or damaged, which its package says
    if kind not in EDITS.entries:
        raise UsageError(
            f"{folder} holds an edit of the kind {kind!r}, which no installed package applies: install the one that "
            f"made it (pip install ood-{kind})."
        )
    edited: Backbone = EDITS.load(kind)(backbone, folder)
    return edited
