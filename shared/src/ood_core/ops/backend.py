"""Which implementation of an operation runs: the modules `reference`, `torch` and `triton` of its package."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor, is_grad_enabled

from ood_core import check

__all__ = ["implementation"]

_BACKENDS = ("reference", "torch", "triton")


def implementation(operation: str, backend: str | None, *tensors: Tensor, gradients: bool = True) -> ModuleType:
    """The module that runs an operation on these tensors.

    Args:
        operation: dotted name of its package.
        backend: name of the module, or None: "triton" where it can run, otherwise "torch".
        tensors: the arguments, at least one.
        gradients: whether the operation's Triton form gives gradients.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run.

    Example:
        >>> import torch
        >>> implementation("ood_core.ops.topk_patch_softmax", None, torch.ones(1)).__name__
        'ood_core.ops.topk_patch_softmax.torch'
    """
    check.choice("backend", backend, (None, *_BACKENDS))
    on_gpu = tensors[0].is_cuda  # true of HIP devices, too
    missed = not gradients and is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if backend is None:
        backend = "triton" if on_gpu and not missed and find_spec("triton") else "torch"
    if backend == "triton" and not find_spec("triton"):
        raise ValueError("backend='triton' needs the package triton, which is not installed: use backend='torch'.")
    if backend == "triton" and missed:
        raise ValueError("backend='triton' gives no gradients, but a tensor requires one: use backend='torch'.")
    # Imported late: only one backend needs Triton, whose import takes a while.
    module = import_module(f"{operation}.{backend}")
    if backend == "triton" and module.compiled() and not on_gpu:
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA or HIP device, got {tensors[0].device}: move them, use "
            "backend='torch', or start Python with TRITON_INTERPRET=1 to interpret the kernels on any device."
        )
    return module
