"""Named access to a backbone's weight matrices: one naming for every library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "NamedLinear", "fused_qkv"]

KINDS = ("query", "key", "value", "out", "up", "down", "projection")


@dataclass(frozen=True)
class NamedLinear:
    """One weight matrix, stored (out, in), wherever and however a library keeps it.

    Attributes:
        name: "TOWER.LAYER.KIND", e.g. "visual.11.up", "text.3.query", "visual.2.17.down" (stage and block of a
            Swin), "visual.projection".
        parameter: the parameter that holds it.
        rows: the block of rows it takes there (query, key and value of a fused projection), None for all.
        transposed: whether the library stores it (in, out).
    """

    name: str
    parameter: Tensor
    rows: slice | None = None
    transposed: bool = False
    on_change: Callable[[NamedLinear, Tensor], None] = field(default=lambda _, __: None, repr=False)

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in], a view without gradient: copy it before an edit."""
        whole = self.parameter.detach()
        whole = whole.T if self.transposed else whole
        return whole if self.rows is None else whole[self.rows]

    def set(self, weight: Tensor) -> None:
        """Overwrite the matrix in place.

        Args:
            weight: [out, in], finite; cast to the stored dtype and device.

        Raises:
            ValueError: another shape, or values that are not finite; the stored weight is then untouched.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"{self.name} is {list(self.weight.shape)}, the new weight {list(weight.shape)}.")
        if not weight.isfinite().all():
            raise ValueError(f"The new weight of {self.name} holds NaN or infinite values; nothing was changed.")
        before = self.weight.clone()
        with torch.no_grad():
            self.weight.copy_(weight)
        self.on_change(self, before)

    def placed(self, weight: Tensor, whole: Tensor | None = None) -> Tensor:
        """The library's whole parameter with another matrix in this one's place; gradients reach `weight`.

        Args:
            weight: [out, in].
            whole: what the other rows are taken from, of the shape of `parameter`; None: the parameter itself.

        Returns:
            A tensor of the shape of `parameter`; nothing is changed.
        """
        weight = weight.to(self.parameter.dtype)
        if self.rows is not None:
            whole = self.parameter.detach() if whole is None else whole
            weight = torch.cat([whole[: self.rows.start], weight, whole[self.rows.stop :]])
        return weight.T if self.transposed else weight

    @contextmanager
    def edited(self, weight: Tensor) -> Iterator[None]:
        """Use another weight inside a `with` block; the old one comes back bit by bit, also after an exception.

        Raises:
            ValueError: as `set`.
        """
        before = self.weight.clone()
        self.set(weight)
        try:
            yield
        finally:
            self.set(before)


def fused_qkv(weight: nn.Parameter) -> dict[str, tuple[nn.Parameter, slice]]:
    """Query, key and value as row blocks of a fused projection [3 D, D]."""
    width = weight.shape[0] // 3
    return {kind: (weight, slice(i * width, (i + 1) * width)) for i, kind in enumerate(KINDS[:3])}
