"""A network on fixed images and prompts, to try one changed weight after another.

A search changes one weight at a time, from the top block down, so most of the network's work stays as it was. Kept:
the inputs of the blocks below, both towers' features, the decoded images. Recomputed for a changed weight: the rest of
its block and the blocks above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from ood_core.backbones.base import Backbone, Layer
from ood_core.backbones.linear import NamedLinear
from torch import Tensor

__all__ = ["Network", "Tower", "image_features", "layer_of", "logits", "text_features"]

Outputs = tuple[Tensor, ...]
T = TypeVar("T")

# Weights behind the attention: for them a block's attention is computed once for all candidates.
_MLP = ("up", "down")


def layer_of(name: str) -> str:
    """ "visual.11" of "visual.11.up"; "visual" of "visual.projection"."""
    return name.rpartition(".")[0]


class Tower:
    """The blocks of a tower on fixed rows (images or prompts), with inputs of blocks kept as far as memory allows.

    Args:
        layers: bottom first.
        first: input tokens of the first block [N, ...].
        finish: (input tokens of the last block [n, ...], their rows [n]) -> features of the tower.
        batch_size: rows per pass; candidates are stacked where there are fewer rows.
        memory: bytes for kept inputs; the first block's are kept in any case, missing ones are computed from those
            below.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        first: Tensor,
        finish: Callable[[Tensor, Tensor], Outputs],
        *,
        batch_size: int,
        memory: int,
    ) -> None:
        self.layers, self.finish, self.batch_size = list(layers), finish, batch_size
        self.kept = {0: first}
        self._keep(memory)

    def __len__(self) -> int:
        return len(self.kept[0])

    def index(self, name: str) -> int:
        """Number of the layer that holds a weight; a projection belongs to the last one."""
        names = [layer.name for layer in self.layers]
        return names.index(layer_of(name)) if layer_of(name) in names else len(names) - 1

    def outputs(self, start: int = 0) -> Outputs:
        """Features of all rows with the weights as they are; what lies below layer `start` is as it was kept."""
        parts = [self._run(self._input(start, rows), start, rows) for rows in self._chunks()]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def candidates(self, linear: NamedLinear, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Outputs]]]:
        """For every chunk of rows its features with each of the `weights` in the place of `linear`.

        The network's own weight is back whenever this yields.
        """
        index = self.index(linear.name)
        for rows in self._chunks():
            yield rows, self._try(index, self._input(index, rows), rows, linear, weights)

    def refresh(self, start: int) -> None:
        """Compute the kept inputs above layer `start` again, after a change of its weights."""
        for index in sorted(index for index in self.kept if index > start):
            below = max(kept for kept in self.kept if kept < index)
            self.kept[index] = torch.cat([self._input(index, rows, below=below) for rows in self._chunks()])

    # ---- inputs

    def _keep(self, memory: int) -> None:
        probe, sizes = self.kept[0][:1], [0]
        for layer in self.layers[:-1]:
            probe = layer(probe)
            sizes.append(probe.numel() * probe.element_size() * len(self))
        stride = next(s for s in range(1, len(sizes) + 1) if sum(sizes[::s]) <= memory or s == len(sizes))
        wanted = list(range(0, len(sizes), stride))
        for below, index in pairwise(wanted):
            self.kept[index] = torch.cat([self._input(index, rows, below=below) for rows in self._chunks()])

    def _input(self, index: int, rows: Tensor, *, below: int | None = None) -> Tensor:
        """Input tokens of a layer, from the nearest kept ones (or those of layer `below`)."""
        start = max(kept for kept in self.kept if kept <= index) if below is None else below
        x = self.kept[start][rows]
        for layer in self.layers[start:index]:
            x = layer(x)
        return x

    def _chunks(self) -> Sequence[Tensor]:
        return torch.arange(len(self), device=self.kept[0].device).split(self.batch_size)

    # ---- from a layer to the features

    def _run(self, x: Tensor, start: int, rows: Tensor) -> Outputs:
        for layer in self.layers[start:-1]:
            x = layer(x)
        return self.finish(x, rows)

    def _try(
        self, index: int, x: Tensor, rows: Tensor, linear: NamedLinear, weights: Sequence[Tensor]
    ) -> list[Outputs]:
        if index == len(self.layers) - 1:
            return [_with(linear, weight, lambda: self.finish(x, rows)) for weight in weights]
        behind = self._rest_of_block(index, x, linear)
        found: list[Outputs] = []
        stack = max(1, self.batch_size // len(rows))
        for start in range(0, len(weights), stack):
            group = weights[start : start + stack]
            tokens = torch.cat([_with(linear, weight, behind) for weight in group])
            together = self._run(tokens, index + 1, rows.repeat(len(group)))
            found += zip(*(features.chunk(len(group)) for features in together), strict=True)
        return found

    def _rest_of_block(self, index: int, x: Tensor, linear: NamedLinear) -> Callable[[], Tensor]:
        layer = self.layers[index]
        x = layer.enter(x)
        if not linear.name.endswith(_MLP):
            return lambda: layer.block(x)
        attended = layer.parts.attend(x)
        return lambda: layer.parts.feed_forward(attended)


def _with(linear: NamedLinear, weight: Tensor, compute: Callable[[], T]) -> T:
    """As `NamedLinear.edited`, without the fingerprints: candidates come and go by the thousand."""
    before = linear.weight.clone()
    linear.weight.copy_(weight)
    try:
        return compute()
    finally:
        linear.weight.copy_(before)


class Network:
    """Both towers (or a classifier) on fixed images and prompts; logits for any one changed weight.

    The backbone given is changed by `commit`: pass a copy.

    Args:
        backbone: whose blocks are known; with a text tower, or a classifier.
        pixels: transformed images [N, 3, H, W].
        prompts: one per class; None for a classifier.
        batch_size: images per pass.
        memory: bytes for kept inputs of blocks, per tower.
    """

    def __init__(
        self, backbone: Backbone, pixels: Tensor, prompts: Sequence[str] | None, *, batch_size: int, memory: int
    ) -> None:
        self.backbone = backbone
        options = {"batch_size": batch_size, "memory": memory}
        with torch.no_grad():
            first = torch.cat([backbone.embed(backbone.prepare(part)) for part in pixels.split(batch_size)])
            self.towers = {"visual": Tower(backbone.layers(), first, self._finish_images, **options)}
            if prompts is not None:
                self.towers["text"] = self._text_tower(list(prompts), options)
        self._features: dict[str, Outputs] = {}
        # From which layer on a tower's features are to be computed when they are next asked for.
        self._stale = {name: max(tower.kept) for name, tower in self.towers.items()}

    def __len__(self) -> int:
        return len(self.towers["visual"])

    def _text_tower(self, prompts: list[str], options: dict[str, int]) -> Tower:
        embeddings, self._ends = self.backbone.embed_texts(prompts)
        layers = self.backbone.layers("text", embeddings.shape[1])
        return Tower(layers, self.backbone.add_positions(embeddings), self._finish_texts, **options)

    # ---- features

    def _finish_images(self, x: Tensor, rows: Tensor) -> Outputs:
        return image_features(self.backbone, x)

    def _finish_texts(self, x: Tensor, rows: Tensor) -> Outputs:
        return (text_features(self.backbone, self.backbone.text_tail(x, self._ends[rows])),)

    def features(self, tower: str) -> Outputs:
        """Features of a tower with the weights as they are."""
        if tower in self._stale:
            self._features[tower] = self.towers[tower].outputs(self._stale.pop(tower))
        return self._features[tower]

    # ---- logits

    @torch.no_grad()
    def evaluate(
        self, name: str, weights: Sequence[Tensor], terms: Callable[[Tensor, Tensor, Tensor], T]
    ) -> list[list[T]]:
        """What `terms` makes of the logits, for every candidate weight, chunk by chunk.

        Args:
            name: of the weight that the candidates replace.
            weights: M candidates [out, in].
            terms: (global logits [n, C], local logits [n, P, C], rows [n]) -> anything.

        Returns:
            M lists, one entry per chunk of images, in order.
        """
        found: list[list[T]] = [[] for _ in weights]
        linear = self.backbone.linear(name)
        if name.startswith("visual"):
            text = self.features("text")[0] if "text" in self.towers else None
            for rows, outputs in self.towers["visual"].candidates(linear, weights):
                for terms_of, (image, local) in zip(found, outputs, strict=True):
                    terms_of.append(terms(*logits(self.backbone, image, local, text), rows))
            return found
        parts = [outputs for _, outputs in self.towers["text"].candidates(linear, weights)]
        texts = [torch.cat([part[0] for part in of_one]) for of_one in zip(*parts, strict=True)]
        image, local = self.features("visual")
        for terms_of, text in zip(found, texts, strict=True):
            for rows in self.towers["visual"]._chunks():
                terms_of.append(terms(*logits(self.backbone, image[rows], local[rows], text), rows))
        return found

    # ---- decisions

    @torch.no_grad()
    def commit(self, name: str, weight: Tensor, *, refresh: bool = False) -> None:
        """Put a weight in for good.

        Args:
            name: of the weight.
            weight: [out, in].
            refresh: compute the inputs of the blocks above again; without it, only this block and those below may
                be tried afterwards.
        """
        kind = name.partition(".")[0]
        self.backbone.linear(name).weight.copy_(weight)
        index = self.towers[kind].index(name)
        self._stale[kind] = min(index, self._stale.get(kind, index))
        if refresh:
            self.towers[kind].refresh(index)


# ---- from the last blocks to logits; gradients flow


def image_features(backbone: Backbone, x: Tensor) -> tuple[Tensor, Tensor]:
    """Image embedding [n, d] and local features [n, P, d] from input tokens of the last block.

    Unit norm where they are compared with texts, raw where a classifier reads them.
    """
    image, local = backbone.tail(backbone.layers()[-1].enter(x))
    if "prompts" not in backbone.capabilities:
        return image, local
    return F.normalize(image, dim=-1), F.normalize(local, dim=-1)


def text_features(backbone: Backbone, hidden: Tensor) -> Tensor:
    """Unit text features [n, d] of what the text tower gives before its projection, [n, D]."""
    return F.normalize(backbone.project_text(hidden), dim=-1)


def logits(backbone: Backbone, image: Tensor, local: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scaled logits [n, C] and [n, P, C] of features; of the classifier head where there are no texts."""
    if text is None:
        return backbone.logits(image), backbone.logits(local)
    scaled = backbone.logit_scale * text.T
    return image @ scaled, local @ scaled
