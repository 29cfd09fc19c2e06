"""What HVL learns, and its losses: an adapter of the embeddings and a bias of the class texts per scale."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ood_core import check
from torch import Tensor, nn

from ood_hvl.functional import (
    adapt,
    combine,
    entropy,
    entropy_gain,
    fuse,
    id_loss_from_log,
    keep_mask,
    log_pool,
    ood_loss_from_log,
    parent_index,
    patch_log_probabilities,
    pool,
    pseudo_ood,
)

__all__ = ["HVLModel", "Scales"]


class Scales(NamedTuple):
    """What the model makes of a batch: scale 0 is the whole image, 1 the middle, 2 the fine tiles.

    Attributes:
        u0: adapted embeddings of the whole images [B, d].
        h1: fused middle tiles [B, n^2, d].
        h2: fused fine tiles [B, 4 n^2, d].
        log_p: log-probabilities [B, C], [B, n^2, C] and [B, 4 n^2, C].
        entropy1: of the middle tiles [B, n^2].
        entropy2: of the fine tiles [B, 4 n^2].
        keep1: bool [B, n^2], the tiles that are sure enough.
        keep2: bool [B, 4 n^2].
    """

    u0: Tensor
    h1: Tensor
    h2: Tensor
    log_p: tuple[Tensor, Tensor, Tensor]
    entropy1: Tensor
    entropy2: Tensor
    keep1: Tensor
    keep2: Tensor

    def pooled(self, mean: str) -> tuple[Tensor, Tensor, Tensor]:
        """p^0, p^1, p^2, each [B, C]; `mean` as in `functional.pool`."""
        p0, p1, p2 = (log_p.exp() for log_p in self.log_p)
        return p0, pool(p1, self.keep1, mean=mean), pool(p2, self.keep2, mean=mean)

    def combined(self, mean: str) -> tuple[Tensor, Tensor, Tensor]:
        """p_ID [B, C], score [B] and class [B], see `functional.combine`."""
        return combine(*self.pooled(mean))

    def gain(self) -> Tensor:
        """Entropy gain of the fine tiles [B, 4 n^2]."""
        return entropy_gain(self.entropy1, self.entropy2, parent_index(isqrt(self.h1.shape[1])))


class HVLModel(nn.Module):
    """The learned part of HVL on embeddings of a frozen encoder.

    Args:
        text: class texts [C, d].
        tau: temperature of the class probabilities.
        csf: cross-scale fusion (Eq. 1); False leaves tiles without context.
        adapter: "shared" by the three scales, or one "per_scale".
        normalize: bring embeddings to unit norm first.
        selection: of pseudo-OOD tiles: by entropy "gain", by "background" (true class not among the likeliest fifth
            of the classes), or "none".
        lower_scales: pseudo-OOD embeddings of the coarser scales, too (Eq. 4); False takes those of the fine tiles.
        k: pseudo-OOD tiles per image, at most 4 n^2.
        seed: of the adapter's start.

    Example:
        >>> model = HVLModel(torch.eye(3, 8))
        >>> model(torch.randn(2, 21, 8)).combined("paper")[1].shape
        torch.Size([2])
    """

    def __init__(
        self,
        text: Tensor,
        *,
        tau: float = 0.01,
        csf: bool = True,
        adapter: str = "shared",
        normalize: bool = True,
        selection: str = "gain",
        lower_scales: bool = True,
        k: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tau, self.csf, self.normalize = check.positive("tau", tau), csf, normalize
        self.selection = check.choice("selection", selection, ("gain", "background", "none"))
        self.lower_scales, self.k = lower_scales, check.integer("k", k, 1, 2**31)
        classes, width = text.shape
        count = 3 if check.choice("adapter", adapter, ("shared", "per_scale")) == "per_scale" else 1
        # Not 0, where the gradient of relu(v W) would be 0 for ever; small, so that training starts at CLIP itself.
        start = torch.randn(count, width, width, generator=torch.Generator().manual_seed(seed)) * 0.1 / width**0.5
        self.adapter = nn.Parameter(start)
        self.bias0 = nn.Parameter(torch.zeros(classes, width))
        self.bias2 = nn.Parameter(torch.zeros(classes, width))
        self.register_buffer("text", text.detach().clone())

    text: Tensor

    def texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Class texts of the three scales; the middle bias is the mean of the other two."""
        middle = (self.bias0 + self.bias2) / 2
        return self.text + self.bias0, self.text + middle, self.text + self.bias2

    def forward(self, v: Tensor) -> Scales:
        """Embeddings [B, 1 + 5 n^2, d] to class probabilities of every tile."""
        n = isqrt((v.shape[1] - 1) // 5)
        v = v.to(self.adapter.dtype)
        if self.normalize:
            v = F.normalize(v, dim=-1)
        u0, u1, u2 = (
            adapt(part, self.adapter[s % len(self.adapter)]) for s, part in enumerate(v.split([1, n * n, 4 * n * n], 1))
        )
        h1, h2 = fuse(u0[:, 0], u1, u2) if self.csf else (u1, u2)
        log_p0, log_p1, log_p2 = self._log_probabilities(u0[:, 0], h1, h2)
        entropy1, entropy2 = entropy(log_p1.exp()), entropy(log_p2.exp())
        keep1, keep2 = keep_mask(entropy1), keep_mask(entropy2)
        return Scales(u0[:, 0], h1, h2, (log_p0, log_p1, log_p2), entropy1, entropy2, keep1, keep2)

    def _log_probabilities(self, *embeddings: Tensor) -> tuple[Tensor, ...]:
        return tuple(patch_log_probabilities(h, t, tau=self.tau) for h, t in zip(embeddings, self.texts(), strict=True))

    def losses(self, v: Tensor, labels: Tensor, *, ood_weight: float = 1.0) -> dict[str, Tensor]:
        """L_ID (Eq. 3) and L_OOD (Eq. 5) of a batch.

        Args:
            v: embeddings [B, 1 + 5 n^2, d].
            labels: int64 [B].
            ood_weight: factor of L_OOD.

        Returns:
            "id", and "ood" unless `selection` is "none" or the weight 0.
        """
        scales = self(v)
        log_p0, log_p1, log_p2 = scales.log_p
        found = {"id": id_loss_from_log(log_p0, log_pool(log_p1, scales.keep1), log_pool(log_p2, scales.keep2), labels)}
        if self.selection != "none" and ood_weight:
            found["ood"] = ood_weight * self._ood_loss(scales, labels)
        return found

    def _ood_loss(self, scales: Scales, labels: Tensor) -> Tensor:
        if self.selection == "gain":
            return ood_loss_from_log(*self._pseudo_ood(scales, self.select(scales)))
        everywhere = torch.arange(scales.h2.shape[1], device=labels.device).expand(len(labels), -1)
        outside = background(scales.log_p[2], labels)
        logs = self._pseudo_ood(scales, everywhere)
        entropies = torch.stack([entropy(log_p.exp()) for log_p in logs]).sum(0)
        # An image without such tiles counts as 0, so that every image weighs the same.
        return -((entropies * outside).sum(1) / outside.sum(1).clamp(min=1)).mean()

    def select(self, scales: Scales) -> Tensor:
        """The K fine tiles of largest entropy gain [B, K], the lower number first among equals."""
        gain = scales.gain().detach()
        if self.k > gain.shape[1]:
            raise ValueError(f"k={self.k} is more than the {gain.shape[1]} fine tiles of an image: lower k or raise n.")
        return gain.sort(dim=1, descending=True, stable=True).indices[:, : self.k]

    def _pseudo_ood(self, scales: Scales, index: Tensor) -> tuple[Tensor, ...]:
        q0, q1, q2 = pseudo_ood(scales.u0, scales.h1, scales.h2, index)
        return self._log_probabilities(*((q0, q1, q2) if self.lower_scales else (q2, q2, q2)))


def background(log_p: Tensor, labels: Tensor) -> Tensor:
    """Tiles whose true class is not among the likeliest max(1, C // 5), as LoCoOp selects them: bool [B, N]."""
    top = log_p.detach().topk(max(1, log_p.shape[-1] // 5), -1).indices
    return (top != labels[:, None, None]).all(-1)
