"""What the training is made of: every number, the class names and the texts."""

from __future__ import annotations

from dataclasses import dataclass

from ood_core.data import scenes

TEMPLATES = ["a photo of a {}", "a photo of a {}.", "{}", "{}.", "a {}", "a picture of a {}", "an image of a {}"]
SCENE_NAMES = [
    name
    for name in (f"{material} {shape}" for material in scenes.MATERIALS for shape in scenes.SHAPES)
    if name not in scenes.NEAR_OOD_CLASSES  # unknown to the demo, so unknown to its backbone
]


@dataclass(frozen=True)
class Recipe:
    """Every number of the training, as stored in the checkpoint and the model card."""

    samples: int = 600_000
    batch: int = 128
    small: int = 40
    small_share: float = 0.7
    muon_lr: float = 0.02
    adamw_lr: float = 1.5e-3
    weight_decay: float = 0.1  # of Muon; at 0.01 weights grow until the attention is one-hot and learning stalls
    logit_scale: float = 20.0  # initial
    warmup: int = 200  # steps
    steady: float = 0.15  # share of the run until the rate falls, linearly to zero
    crop_area: float = 0.5
    jitter: float = 0.15
    label_smoothing: float = 0.05
    average: float = 0.999  # decay per step of the running average of the weights, which is what is exported
    mosaic_share: float = 0.5  # of the photographs, four of which make one image
    mosaic_weight: float = 0.2  # of the patches of mosaics
    best_share: float = 0.2  # of a single photograph's patches: those that have to show its class
    best_weight: float = 0.225
    distill_weight: float = 0.0  # of single photographs: towards the class shares that the shipped weights give them
    scene_share: float = 0.12
    paste_share: float = 0.5  # of the scenes: with another scene and its object behind the object
    scene_weight: float = 0.075  # of the patches of scenes
    scenes_per_class: int = 150
    texts: int = 64
    text_every: int = 4  # steps: the text tower only follows the class matrix
    seed: int = 0
    start: str = ""  # SHA-256 of the finished weights this run continues from; empty: random weights

    @property
    def steps(self) -> int:
        return self.samples // self.batch


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    return min(1.0, (step + 1) / recipe.warmup, (1 - step / recipe.steps) / (1 - recipe.steady))
