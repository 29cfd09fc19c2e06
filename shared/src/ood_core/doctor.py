"""What is installed, which devices there are, what would help, and what loading a backbone decided."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ood_core.backbones import resolve_dtype
from ood_core.detectors import broken_detectors, detector_class, list_detectors

if TYPE_CHECKING:
    from ood_core.backbones.base import Backbone

__all__ = ["check_plugins", "examine", "examine_backbone"]

_OPTIONAL = {
    "transformers": "backbones hf:...: pip install 'ood-core[transformers]'",
    "pydicom": "DICOM images: pip install 'ood-core[dicom]'",
    "tifffile": "TIFF files of more kinds (float64, planes, many channels): pip install 'ood-core[tiff]'",
    "triton": "GPU kernels: comes with torch's CUDA builds on Linux",
    "ood-iim": "IIM and S-MCM: pip install ood-iim",
    "ood-setar": "SeTAR: pip install ood-setar",
    "ood-hvl": "HVL: pip install ood-hvl",
    "ood-mofe": "MoFE: pip install ood-mofe",
}


def examine() -> dict[str, Any]:
    """Installed versions, devices, the kernels that would run, broken plug-ins and suggestions.

    Example:
        >>> "torch" in examine()["installed"]
        True
    """
    required = ("ood-core", "torch", "open-clip-torch", "timm", "numpy", "scikit-learn")
    found = {name: _version(name) for name in (*required, *_OPTIONAL)}
    return {
        "installed": {name: v or "not installed" for name, v in found.items()},
        "devices": _devices(),
        "kernels": {"topk_patch_softmax": _kernel()},
        "broken detectors": broken_detectors() or ["none"],
        "suggestions": [hint for name, hint in _OPTIONAL.items() if not found[name]] or ["nothing is missing"],
    }


def check_plugins() -> dict[str, Any]:
    """What every detector needs of a backbone, and the error of those whose package cannot be imported.

    Returns:
        "needs": name -> capabilities, sorted; "broken": name -> error.

    Example:
        >>> check_plugins()["needs"]["mcm"]
        ['image', 'text']
    """
    broken = broken_detectors()
    working = (name for name in list_detectors() if name not in broken)
    return {"needs": {name: sorted(detector_class(name).capabilities) for name in working}, "broken": broken}


def examine_backbone(backbone: Backbone) -> dict[str, Any]:
    """What a backbone is, and what loading it decided.

    Returns:
        "backbone" (its spec), "fingerprint" and "decisions": a list of {"what", "value", "source"}.

    Example:
        >>> from ood_core import create_backbone
        >>> examine_backbone(create_backbone("tiny"))["backbone"]
        'tiny'
    """
    made = [("capabilities", ", ".join(sorted(backbone.capabilities))), ("width", str(backbone.width))]
    if backbone.grid:
        made.append(("patch grid", " x ".join(map(str, backbone.grid))))
    decisions = [decision._asdict() for decision in backbone.decisions]
    decisions += [{"what": what, "value": value, "source": "the loaded network"} for what, value in made]
    return {"backbone": backbone.spec, "fingerprint": backbone.fingerprint, "decisions": decisions}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    precision = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    devices = {"cpu": f"{torch.get_num_threads()} threads, dtype auto = {precision}"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return devices


def _kernel() -> str:
    if find_spec("triton"):
        return "triton on CUDA and HIP devices, torch (chunked, exact) on every other and for gradients"
    return "torch (chunked, exact) on every device; triton is absent"
