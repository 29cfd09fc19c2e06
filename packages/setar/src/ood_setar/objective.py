"""What a search minimises: the paper's loss, or how badly a score tells images from their own pseudo-OOD cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from ood_core import check, metrics
from ood_core.functional import msp
from torch import Tensor

from ood_setar.functional import LossTerms, check_weight, loss_terms, pseudo_ood_cells

__all__ = ["OBJECTIVES", "SCORERS", "Objective", "Terms"]

OBJECTIVES = ("loss", "auroc", "aupr", "fpr95")
SCORERS = ("mcm", "gl_mcm", "energy")

_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "auroc": metrics.auroc,
    "aupr": metrics.aupr_in,
    "fpr95": metrics.fpr_at_tpr,
}


class Terms(NamedTuple):
    """What an objective keeps of a chunk of images: the loss terms [n], and scores where it needs them."""

    loss: LossTerms
    id_scores: Tensor | None = None
    cell_scores: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A value to minimise, from the logits of ID images alone.

    Attributes:
        k: a cell is pseudo-OOD if its class is not among its k largest logits.
        name: "loss", or "auroc", "aupr", "fpr95" of `scorer` between images and their pseudo-OOD cells.
        weight: lambda, factor of the OOD part of the loss.
        batch: images that the loss pools its cells over, in order; the values are averaged by batch size.
        scorer: "mcm", "gl_mcm" or "energy"; a cell counts as an image whose cells are the image's pseudo-OOD cells.
        temperature: divides the logits in the scores.
    """

    k: int
    name: str = "loss"
    weight: float = 0.1
    batch: int = 512
    scorer: str = "mcm"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check.choice("objective", self.name, OBJECTIVES)
        check.choice("scorer", self.scorer, SCORERS)
        check_weight(self.weight)
        check.integer("loss_batch", self.batch, 1, 2**62)
        check.positive("temperature", self.temperature)

    def terms(self, global_logits: Tensor, local_logits: Tensor, labels: Tensor) -> Terms:
        """What is needed of a chunk of images."""
        loss = loss_terms(global_logits, local_logits, labels, k=self.k)
        if self.name == "loss":
            return Terms(loss)
        cells = pseudo_ood_cells(local_logits, labels, k=self.k)
        return Terms(loss, *self._scores(global_logits, local_logits, cells))

    def measure(self, parts: Sequence[Terms]) -> dict[str, float]:
        """All figures of a candidate from its chunks; `value` picks the one that counts."""
        terms = LossTerms(*map(torch.cat, zip(*(part.loss for part in parts), strict=True)))
        batches = [LossTerms(*columns) for columns in zip(*(column.split(self.batch) for column in terms), strict=True)]
        ood = sum(len(batch.cells) * batch.ood_loss().item() for batch in batches) / len(terms.cells)
        id_loss = terms.id_loss().item()
        found = {
            "loss": id_loss + self.weight * ood,
            "loss_id": id_loss,
            "loss_ood": ood,
            "accuracy": terms.correct.double().mean().item(),
            "pseudo_ood_cells": int(terms.cells.sum()),
        }
        if self.name != "loss":
            found[self.name] = self._metric(parts)
        return found

    def value(self, measured: dict[str, float]) -> float:
        """The figure of `measure` to minimise."""
        return -measured[self.name] if self.name in ("auroc", "aupr") else measured[self.name]

    def _metric(self, parts: Sequence[Terms]) -> float:
        images, cells = zip(*((part.id_scores, part.cell_scores) for part in parts), strict=True)
        cell_scores = torch.cat(cells)
        if not len(cell_scores):  # nothing to be told apart: the worst value, so that no candidate wins by it
            return 1.0 if self.name == "fpr95" else 0.0
        return float(_METRICS[self.name](torch.cat(images), cell_scores))

    def _scores(self, global_logits: Tensor, local_logits: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        temperature = self.temperature
        if self.scorer == "energy":
            images, of_cells = (temperature * (x / temperature).logsumexp(-1) for x in (global_logits, local_logits))
            return images, of_cells[cells]
        of_cells = (local_logits / temperature).softmax(-1).amax(-1)  # [n, P]
        images = msp(global_logits, temperature=temperature)
        if self.scorer == "mcm":
            return images, of_cells[cells]
        best = of_cells.masked_fill(~cells, 0).amax(-1, keepdim=True).expand_as(of_cells)
        return images + of_cells.amax(-1), (of_cells + best)[cells]
