"""Steps that `reproduce` shares with the other commands."""

from __future__ import annotations

__all__ = ["accuracy", "lora_start", "new_detector", "read_edit", "search_in", "train_in"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ood_core.backbones.base import Backbone
from ood_core.data.sources import ImageSource
from ood_core.detectors import create_detector, detector_class
from ood_core.detectors.base import Detector
from ood_core.features import extract
from ood_core.prompts import text_features

from ood_setar.edit import SeTAREdit
from ood_setar.finetune import finetune, lora
from ood_setar.search import search, visiting_order


def read_edit(path: str | Path) -> SeTAREdit:
    """A saved edit, or a config_best.json of the released code."""
    path = Path(path)
    return SeTAREdit.from_released(path) if path.suffix == ".json" else SeTAREdit.from_pretrained(path)


def search_in(folder: str | Path, backbone: Backbone, images: Any, **options: Any) -> SeTAREdit:
    """Search and save; a search that was interrupted goes on from the log in `folder`.

    Args:
        folder: for the edit.
        backbone: unedited.
        images: labelled.
        **options: of `search`.
    """
    edit = search(backbone, images, log_file=Path(folder) / "search.jsonl", **options)
    edit.save_pretrained(folder)
    return edit


def lora_start(backbone: Backbone, *, seed: int, **options: Any) -> SeTAREdit:
    """LoRA on one weight of every block, before training.

    Args:
        backbone: unedited.
        seed: of the factors.
        **options: of `lora`, and `kind` and `order` of `visiting_order`.
    """
    order = options.pop("order", None) or ("visual_text" if "prompts" in backbone.capabilities else "visual_only")
    names = visiting_order(backbone.linears(), kind=options.pop("kind", "up"), order=order)
    return lora(backbone, names, seed=seed, **options)


def train_in(folder: str | Path, backbone: Backbone, images: Any, edit: SeTAREdit, **options: Any) -> SeTAREdit:
    """Fine-tune and save; a run that was interrupted goes on from the checkpoint in `folder`.

    Args:
        folder: for the edit.
        backbone: unedited.
        images: labelled.
        edit: of a search or of LoRA.
        **options: of `finetune`.
    """
    checkpoint = Path(folder) / "checkpoint.safetensors"
    tuned = finetune(backbone, images, edit, checkpoint=checkpoint, **options)
    tuned.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return tuned


def new_detector(
    name: str,
    backbone: Backbone,
    class_names: Sequence[str] | None,
    template: str | None,
    options: Mapping[str, Any],
) -> Detector:
    """A detector with those of the options that it has.

    Args:
        name: of `list_detectors()`.
        backbone: edited or not.
        class_names: C names.
        template: prompt of a class; None is the detector's own.
        options: of any detector.
    """
    known = detector_class(name).option_names()
    mine = {key: value for key, value in options.items() if key in known}
    return create_detector(name, backbone=backbone, class_names=class_names, template=template, **mine)


def accuracy(backbone: Backbone, source: ImageSource, template: str, **extraction: Any) -> float:
    """Share of images whose label is the nearest of all label names.

    Args:
        backbone: with a text tower.
        source: labelled.
        template: prompt of a label.
        **extraction: for `extract`.
    """
    features = extract(backbone, source, needs={"image"}, **extraction)
    text = text_features(backbone, source.label_names, template).to(features.image.device)
    return (features.image @ text.T).argmax(1).eq(features.labels).double().mean().item()
