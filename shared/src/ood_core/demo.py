"""The demo: generated image folders, then the ordinary pipeline with every installed detector and their fusion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ood_core.backbones.base import Backbone
from ood_core.data import ImageFolder, scenes
from ood_core.detectors import broken_detectors, create_detector, detector_class, list_detectors
from ood_core.detectors.base import Detector
from ood_core.evaluation import Evaluation, evaluate
from ood_core.fusion import Fusion

__all__ = ["run_demo", "write_folders"]

SET_KINDS = {"near-combinations": "near", "textures": "far", "noise": "far", "digits": "far", "lesions": "far"}

NOTES = [
    "Images are generated, except the digits (real handwriting shipped with scikit-learn).",
    "near-combinations holds materials and shapes that the known classes also have, in other combinations. The "
    "embedded backbone saw such combinations in its training (as CLIP has seen most OOD classes); the detectors, "
    "which only know the class list and the few training images, did not.",
]


def write_folders(root: Path, *, size: int = 64, seed: int = 0) -> dict[str, Path]:
    """Write the demo's image folders.

    Args:
        root: they go below it: id-train (16 images per class), id-calibration (25), id-test (40) and the OOD sets.
        size: of the images in pixels.
        seed: another seed gives other images.

    Returns:
        Name of the set -> folder.
    """
    made = {
        "id-train": scenes.render(scenes.ID_CLASSES, 16, size=size, seed=3 * seed),
        "id-calibration": scenes.render(scenes.ID_CLASSES, 25, size=size, seed=3 * seed + 1),
        "id-test": scenes.render(scenes.ID_CLASSES, 40, size=size, seed=3 * seed + 2),
        "near-combinations": scenes.render(scenes.NEAR_OOD_CLASSES, 40, size=size, seed=3 * seed + 2),
        "textures": scenes.textures(200, size=size, seed=seed),
        "noise": scenes.noise(200, size=size, seed=seed),
        "digits": scenes.digits(200, size=size, seed=seed),
        "lesions": scenes.render_lesions(list(scenes.LESIONS), 35, size=size, seed=seed),
    }
    return {name: scenes.write_folder(images, root / name) for name, images in made.items()}


def run_demo(out: str | Path, *, backbone: Backbone, seed: int = 0, say: Callable[[str], None]) -> Evaluation:
    """Write image folders below `out`, score them with every installed detector and their fusion, report.

    Args:
        out: folder for data, results.json, scores.parquet and report.html.
        backbone: that every detector uses.
        seed: of the images.
        say: receives one line per step.

    Returns:
        The evaluation.
    """
    out = Path(out)
    say(f"Writing image folders to {out / 'data'}")
    folders = write_folders(out / "data", seed=seed)
    train = ImageFolder(folders["id-train"])
    names = [name for name in list_detectors() if name not in broken_detectors()]
    usable = [name for name in names if _fits(name, backbone)]
    say(f"Scoring with {', '.join(usable)} and their fusion on backbone {backbone.spec!r}")
    detectors: dict[str, Detector] = {
        name: create_detector(
            name, backbone=backbone, class_names=train.label_names, **detector_class(name).demo_options
        )
        for name in usable
    }
    return evaluate(
        detectors | {"fusion": Fusion(detectors)},
        id=folders["id-test"],
        ood={name: folders[name] for name in SET_KINDS},
        fit=train,
        calibrate=folders["id-calibration"],
        bootstrap=200,
        seed=seed,
        out=out,
        set_kinds=SET_KINDS,
        notes=NOTES,
    )


def _fits(name: str, backbone: Backbone) -> bool:
    return detector_class(name).capabilities <= backbone.capabilities
