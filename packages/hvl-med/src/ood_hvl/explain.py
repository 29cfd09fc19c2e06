"""Why an image got its HVL score: the three scales' diagnoses, the tiles kept, and where pseudo-OOD was mined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from ood_core import explanation
from ood_core.explanation import judged
from ood_core.pictures import panels
from ood_core.pictures.panels import Panel
from PIL import Image, ImageEnhance
from torch import Tensor

if TYPE_CHECKING:  # it explains itself by this module
    from ood_hvl.detectors import HVL

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation(explanation.Explanation):
    """What went into the score of one image, besides what `ood_core.explanation.Explanation` holds.

    Tiles are numbered row by row from 0.

    Attributes:
        probabilities: float32 [C], mean over the three scales.
        scale_probabilities: float32 [3, C], of the whole image, the middle and the fine tiles.
        entropies: of the middle tiles [n, n] and the fine tiles [2n, 2n], in nats.
        kept: bool, the tiles that are sure enough, in the same shapes.
        best_class: int64, the most likely class of every tile, in the same shapes.
        gain: entropy gain of the fine tiles [2n, 2n].
        pseudo_ood: the K fine tiles of largest gain, which training pushes towards "undecided", largest first.
        class_names: the known classes.
    """

    probabilities: Tensor
    scale_probabilities: Tensor
    entropies: tuple[Tensor, Tensor]
    kept: tuple[Tensor, Tensor]
    best_class: tuple[Tensor, Tensor]
    gain: Tensor
    pseudo_ood: list[int]
    class_names: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All but the picture as plain values for JSON; classes by name."""
        named = [dict(zip(self.class_names, row, strict=True)) for row in self.scale_probabilities.tolist()]
        scales = [
            {
                "entropies": self.entropies[s].tolist(),
                "kept": self.kept[s].tolist(),
                "best_class": [[self.class_names[index] for index in row] for row in self.best_class[s].tolist()],
            }
            for s in range(2)
        ]
        return {
            **super().to_dict(),
            "pseudo_ood": self.pseudo_ood,
            "probabilities": dict(zip(self.class_names, self.probabilities.tolist(), strict=True)),
            "whole": {"probabilities": named[0]},
            "middle": {"probabilities": named[1]} | scales[0],
            "fine": {"probabilities": named[2]} | scales[1],
            "gain": self.gain.tolist(),
        }

    def shown(self) -> list[Panel]:
        """Five panels: image, kept tiles of both scales, classes of the fine tiles, entropy gain."""
        return [_whole(self), _tiles(self, 0), _tiles(self, 1), _classes(self), _gain(self)]


@torch.no_grad()
def explain(detector: HVL, image: Image.Image) -> Explanation:
    """Take the score of one image apart.

    Args:
        detector: a fitted `HVL` with a backbone.
        image: of any size and mode.

    Raises:
        UsageError: another detector, or one without backbone.
        NotFittedError: before `fit`.

    Example:
        >>> explain(detector, Image.open("lesion.jpg")).draw("why.png")  # doctest: +SKIP
    """
    features, judgement = judged(detector, image, "an 'hvl' detector", "hvl")
    scales, n = detector.scales(features), detector.pyramid.n
    shapes = ((n, n), (2 * n, 2 * n))
    return Explanation(
        **judgement,
        probabilities=scales.combined(detector.matching.patch_mean)[0][0].cpu(),
        scale_probabilities=torch.cat(scales.pooled(detector.matching.patch_mean)).cpu(),
        entropies=(scales.entropy1.view(shapes[0]).cpu(), scales.entropy2.view(shapes[1]).cpu()),
        kept=(scales.keep1.view(shapes[0]).cpu(), scales.keep2.view(shapes[1]).cpu()),
        best_class=(scales.log_p[1].argmax(-1).view(shapes[0]).cpu(), scales.log_p[2].argmax(-1).view(shapes[1]).cpu()),
        gain=scales.gain().view(shapes[1]).cpu(),
        pseudo_ood=detector.trained_model(features).select(scales)[0].tolist(),
        class_names=list(detector.class_names),
    )


# The picture. Its side is a whole number of pixels per fine tile, so that all edges fall on the same places.

_SIDE = 320
_KEPT, _MINED = panels.COLORS[2], panels.COLORS[5]
_SCALES = ("middle", "fine")


def _cell(found: Explanation, scale: int) -> int:
    fine = max(1, round(_SIDE / len(found.gain)))
    return fine if scale else 2 * fine


def _enlarged(found: Explanation) -> Image.Image:
    side = len(found.gain) * _cell(found, 1)
    return found.image.resize((side, side), Image.Resampling.BICUBIC)


def _likeliest(found: Explanation, probabilities: Tensor) -> str:
    # Pooled probabilities may sum to less than 1: the share of tiles kept.
    value, index = probabilities.max(0)
    return f"{panels.printable(found.class_names[int(index)])} {100 * float(value):.0f} %"


def _whole(found: Explanation) -> Panel:
    names = ("whole image", "middle tiles", "fine tiles")
    lines = [
        (None, f"{name}: {_likeliest(found, p)}") for name, p in zip(names, found.scale_probabilities, strict=True)
    ]
    return Panel("Image as the network sees it", _enlarged(found), [*lines, (None, f"mean = score {found.score:.4f}")])


def _tiles(found: Explanation, scale: int) -> Panel:
    """The picture with the tiles left out dimmed, and those kept outlined."""
    kept, cell = found.kept[scale], _cell(found, scale)
    bright = _enlarged(found)
    picture = ImageEnhance.Brightness(bright).enhance(0.35)
    places = [tuple(place) for place in kept.nonzero().tolist()]
    for row, column in places:
        box = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
        picture.paste(bright.crop(box), box[:2])
    panels.outline(picture, places, cell, _KEPT)
    entropies = found.entropies[scale]
    lines = [
        (_KEPT, f"kept: {len(places)} of {kept.numel()}"),
        (
            None,
            f"entropy {float(entropies.min()):.3g} to {float(entropies.max()):.3g}, mean {float(entropies.mean()):.3g}",
        ),
    ]
    return Panel(f"Kept tiles, {_SCALES[scale]} scale", picture, lines)


def _classes(found: Explanation) -> Panel:
    title = "Best class of the fine tiles (number)"
    return panels.class_map(title, found.best_class[1].numpy(), found.class_names, _cell(found, 1))


def _gain(found: Explanation) -> Panel:
    title, values = "Entropy gain", found.gain.double().numpy()
    panel = panels.heat_map(title, values, "tile's entropy minus its parent's", _cell(found, 1))
    places = [divmod(tile, len(found.gain)) for tile in found.pseudo_ood]
    panels.outline(panel.picture, places, _cell(found, 1), _MINED)
    return panel._replace(lines=[*panel.lines, (_MINED, f"the {len(places)} largest: pseudo-OOD in training")])
