"""What loaders of several libraries share: wrappers taken off, channels, files by name, what was decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ood_core.backbones.base import Decision
from ood_core.backbones.transform import ImageTransform
from ood_core.errors import MissingDataError

__all__ = ["activation_name", "as_channels", "file_named", "transform_decisions", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The library's own module: `torch.compile` and `DataParallel` taken off, also from its parts.

    Example:
        >>> type(unwrapped(nn.DataParallel(nn.Linear(2, 3)))).__name__
        'Linear'
    """
    model = _bare(model)
    for parent in model.modules():
        for name, child in parent.named_children():
            if (bare := _bare(child)) is not child:
                setattr(parent, name, bare)
    return model


def _bare(model: Any) -> Any:
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def as_channels(x: Tensor, channels: int) -> Tensor:
    """Images [B, 3, H, W] for a network that reads `channels`; of grey ones all three are equal."""
    return x if channels == 3 else x.mean(1, keepdim=True)


def file_named(name: str, spec: str) -> Path:
    """The file behind "ARCHITECTURE/": relative to the working folder, or from the root if it is only there.

    Raises:
        MissingDataError: neither is there.
    """
    paths = [Path(name).expanduser(), Path(f"/{name}")]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise MissingDataError(f"{spec!r}: there is no file {paths[0]} with weights. Name a .safetensors or .pt file.")
    return found


def activation_name(part: nn.Module) -> str:
    """Name of the first activation in a part of a network, e.g. "QuickGELU"."""
    return next(_activations(part), "unknown")


def _activations(part: nn.Module) -> Iterator[str]:
    for module in part.modules():
        name = type(module).__name__
        if any(word in name for word in ("GELU", "GELu", "SiLU", "ReLU", "Swish", "Sigmoid", "Tanh")):
            tanh = getattr(module, "approximate", "") == "tanh" or name == "GELUTanh"
            yield "GELU (tanh)" if tanh else name


def transform_decisions(
    transform: ImageTransform, *, size: str, rest: str, sources: Mapping[str, str] = MappingProxyType({})
) -> tuple[Decision, ...]:
    """What an image transform does.

    Args:
        transform: of the backbone.
        size: where the image size comes from.
        rest: where everything else comes from.
        sources: where single ones of them come from instead: of "resize" (and the crop), "mean", "std" and
            "interpolation".
    """
    height, width = transform.crop
    target = transform.resize
    if transform.fit == "none":
        resize = "none: the middle is cut out"
    elif target is None:
        resize = f"both sides to {height} x {width}"
    elif isinstance(target, int):
        resize = f"short side to {target}"
    else:
        resize = f"{transform.fit} {target[0]} x {target[1]}"
    where = {name: sources.get(name, rest) for name in ("resize", "mean", "std", "interpolation")}
    return (
        Decision("image size", f"{height} x {width}", size),
        Decision("resize", resize, where["resize"]),
        Decision("crop", "none" if target is None else f"middle {height} x {width}", where["resize"]),
        Decision("mean", _numbers(transform.mean), where["mean"]),
        Decision("std", _numbers(transform.std), where["std"]),
        Decision("interpolation", transform.interpolation, where["interpolation"]),
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
