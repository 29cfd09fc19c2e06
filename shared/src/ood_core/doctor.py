"""What is installed, which devices there are, and what would help."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from ood_core.backbones import _resolve_dtype
from ood_core.detectors import broken_detectors

__all__ = ["examine"]

_OPTIONAL = {
    "transformers": "backbones hf:...: pip install 'ood-core[transformers]'",
    "pydicom": "DICOM images: pip install 'ood-core[dicom]'",
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


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    precision = str(_resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    devices = {"cpu": f"{torch.get_num_threads()} threads, dtype auto = {precision}"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return devices


def _kernel() -> str:
    if find_spec("triton"):
        return "triton on CUDA and HIP devices, torch (chunked, exact) on every other and for gradients"
    return "torch (chunked, exact) on every device; triton is absent"
