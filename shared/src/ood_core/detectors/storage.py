"""Detectors on disk: `config.json` and `model.safetensors`, written together or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from ood_core.calibration import Calibration
from ood_core.detectors import detector_class
from ood_core.detectors.held import Held
from ood_core.errors import DataError, MissingDataError, UsageError
from ood_core.files import check_schema, json_writer, write_together

if TYPE_CHECKING:
    from ood_core.backbones.base import Backbone
    from ood_core.detectors.base import Detector

__all__ = ["load", "save"]

Kind = TypeVar("Kind", bound="Detector")

_WANTED = {"schema", "detector", "params", "class_names", "template", "backbone", "threshold", "tpr"}


def save(detector: Detector, folder: Path) -> None:
    """Write a detector (atomic, no pickle)."""
    known = detector.calibration
    tensors = {f"state.{name}": value.contiguous() for name, value in detector.state.items()}
    others = {
        "fitted_on": detector.fitted_on,
        "calibration": None if known is None else known.scores,
        "calibration.classes": None if known is None else known.classes,
    }
    tensors |= {name: value for name, value in others.items() if value is not None}
    config = detector._config() | {"backbone": detector._held.saved(folder)}
    own = {"model.safetensors": lambda path: save_file(tensors, path), "config.json": json_writer(config)}
    write_together(folder, detector._files() | own)


def load(kind: type[Kind], folder: str | Path, backbone: Backbone | str | None) -> Kind:
    """Read a detector of a kind, see `Detector.from_pretrained`."""
    path = _local_folder(folder)
    config, tensors = _read(path)
    name = config["detector"]
    found = detector_class(name)
    if not issubclass(found, kind):
        raise UsageError(f"{path} holds a {name!r} detector, not a {kind.__name__}.")
    try:
        made = found._empty(path, config)
    except (TypeError, UsageError) as error:  # an option that is not known here
        raise DataError(f"{path} was saved by another version of {name!r}: {str(error).rstrip('.')}.") from error
    # Copies lie in memory as fitted tensors do: the last bits of products depend on the place.
    made.state = {k.removeprefix("state."): v.clone() for k, v in tensors.items() if k.startswith("state.")}
    made.calibration = _calibration(config, tensors)
    made.fitted_on = tensors.get("fitted_on")
    made._held = Held.read(name, config["backbone"], path)
    if backbone is not None:
        made.attach(backbone)
    return made


def _calibration(config: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration | None:
    """Detectors saved by earlier versions have neither classes nor hash."""
    if "calibration" not in tensors:
        return None
    return Calibration(
        scores=tensors["calibration"],
        threshold=config["threshold"],
        tpr=config["tpr"],
        classes=tensors.get("calibration.classes"),
        data_hash=(config.get("calibration") or {}).get("data_hash", ""),
    )


def _local_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        # Some detectors hold others, or an edit, in folders of their own.
        wanted = ["config.json", "model.safetensors", "*/config.json", "*/model.safetensors", "*/edit.*"]
        return Path(snapshot_download(str(folder), allow_patterns=wanted))
    except Exception as error:
        raise MissingDataError(
            f"{folder} is no folder with a saved detector, and no repository of that name could be fetched "
            f"({type(error).__name__})."
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise MissingDataError(f"{path} holds no saved detector: {name} is missing.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "model.safetensors")
    except Exception as error:
        raise DataError(f"{path} holds no readable detector ({type(error).__name__}: {error}).") from error
    if missing := _WANTED - (set(config) if isinstance(config, dict) else set()):
        raise DataError(f"{path / 'config.json'} is not of a saved detector: it lacks {sorted(missing)}.")
    check_schema(config, path / "config.json", "ood-core")
    return config, tensors
