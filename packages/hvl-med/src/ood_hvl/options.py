"""HVL's options, declared once: their groups, defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass

from ood_core import check
from ood_core.options import Options, integer, one_of, option

__all__ = ["Matching", "PseudoOOD", "Pyramid", "Training"]


@dataclass(frozen=True)
class Pyramid(Options):
    """The tiles of an image, and how they are encoded.

    Attributes:
        n: partitions: n x n middle and 2n x 2n fine tiles.
        pyramid_source: tiles of the encoder's "input", or of the "raw" file (see `with_pyramid`).
        resize: "crop" or "squash" (see `with_pyramid`).
        encode_chunk: tiles per pass of the encoder.
    """

    n: int = option(2, lambda name, value: check.integer(name, value, 1, 2**10))
    pyramid_source: str = option("input", one_of("input", "raw"))
    resize: str = option("crop", one_of("crop", "squash"))
    encode_chunk: int = option(256, integer(1))


@dataclass(frozen=True)
class Matching(Options):
    """How the scales are fused, compared with the class texts and read together.

    Attributes:
        tau: temperature of the class probabilities.
        patch_mean: "paper" divides a scale's sum over kept tiles by all tiles, "kept" by those kept.
        csf: cross-scale fusion (Eq. 1).
        adapter: "shared" by the scales, or "per_scale".
        normalize_v: unit-norm embeddings in front of the adapter.
        normalize_t: unit-norm class texts before the biases.
    """

    tau: float = option(0.01, check.positive)
    patch_mean: str = option("paper", one_of("paper", "kept"))
    csf: bool = True
    adapter: str = option("shared", one_of("shared", "per_scale"))
    normalize_v: bool = True
    normalize_t: bool = True


@dataclass(frozen=True)
class PseudoOOD(Options):
    """Tiles that training pushes towards "undecided".

    Attributes:
        k: K, pseudo-OOD tiles per image, at most 4 n^2.
        selection: of pseudo-OOD tiles, "gain", "background" or "none" (no L_OOD).
        lower_scales: pseudo-OOD embeddings of the coarser scales, too (Eq. 4).
        ood_weight: factor of L_OOD.
    """

    k: int = option(4, integer(1))
    selection: str = option("gain", one_of("gain", "background", "none"))
    lower_scales: bool = True
    ood_weight: float = option(1.0, check.factor)


@dataclass(frozen=True)
class Training(Options):
    """How the adapter and the text biases learn.

    Attributes:
        class_balance: None, or "sampler" to draw classes equally often (long tails).
        views: when fitted on images: 1, or 2 (mirrored) or 8 (turned) orientations, drawn per image and epoch.
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: of Adam, at the start of a cosine.
        seed: of the adapter's start, the order and the draws.
    """

    class_balance: str | None = option(None, one_of(None, "sampler"))
    views: int = option(1, one_of(1, 2, 8))
    epochs: int = option(100, integer(1))
    batch_size: int = option(32, integer(1))
    learning_rate: float = option(2e-3, check.positive)
    seed: int = option(0, integer(0))
