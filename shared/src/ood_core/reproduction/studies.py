"""A study: rows of settings, each run with several seeds or folds, and the spread of their figures."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ood_core.backbones.base import Backbone
from ood_core.data.sources import ImageSource
from ood_core.errors import MissingDataError, UsageError
from ood_core.protocols import Protocol
from ood_core.reproduction.kept import UsedImages, recipe
from ood_core.reproduction.published import zero_shot_beside

__all__ = ["Bench", "spread", "study_options"]


@dataclass(frozen=True)
class Bench:
    """A backbone on a protocol, where rows of settings are run once and their figures kept.

    Attributes:
        protocol: the images.
        backbone: frozen, or unedited.
        out: folder of all figures.
        params: options of the method that hold in all rows.
        template: prompt of a class; None is the detector's own.
        seeds: of what is trained.
        extraction: for `extract`.
        convention: of the FPR.
        say: tells a person what is being done.
    """

    protocol: Protocol
    backbone: Backbone
    out: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    seeds: Sequence[int] = (0, 1, 2)
    extraction: Mapping[str, Any] = field(default_factory=dict)
    convention: str = "standard"
    say: Callable[[str], None] = lambda text: None

    purpose: ClassVar[str] = ""
    """What the training images are for, as a clause; errors end in it."""

    @property
    def folder(self) -> Path:
        """Of all figures of this backbone on this protocol."""
        return self.out / self.protocol.name / re.sub(r"[^A-Za-z0-9_.+-]+", "-", self.backbone.spec)

    def train(self) -> ImageSource:
        """The labelled ID images that are learned from.

        Raises:
            MissingDataError: they were not found.
        """
        if self.protocol.train is None:
            (error,) = (row.error for row in self.protocol.found if row.name == "train")
            raise MissingDataError(
                f"{self.protocol.name} has no training images{self.purpose}: --set train=DIR. {error}"
            )
        return self.protocol.train

    def zero_shot(self) -> tuple[dict[str, Any], str]:
        """The accuracy that the backbone is known for, measured; see `zero_shot_beside`."""
        protocol = self.protocol
        return zero_shot_beside(self.backbone, protocol.test, protocol.class_names, self.template, **self.extraction)

    @cached_property
    def _used(self) -> dict[int, UsedImages]:
        return {}

    def recipe(
        self, images: Mapping[str, ImageSource | None], class_names: Sequence[str] | None = None, **about: Any
    ) -> dict[str, Any]:
        """`kept.recipe` on this backbone, which reads the bytes of a source once for all recipes.

        Args:
            images: as there.
            class_names: by default the protocol's.
            **about: as there; template and FPR rule are the bench's where nothing is said.
        """
        used = {
            name: self._used.setdefault(id(source), UsedImages(source))
            for name, source in images.items()
            if source is not None
        }
        return recipe(
            self.backbone,
            used,
            class_names or self.protocol.class_names,
            **{"template": self.template, "convention": self.convention} | about,
        )


def study_options(
    settings: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The options of every row of a study: what a row varies stands, what was given holds elsewhere.

    Args:
        settings: label of a row -> the options it sets.
        given: options that a person asked for.
        say: gets a sentence for each option that some rows keep as the study has it.

    Raises:
        UsageError: an option that every row sets, so that it would count nowhere.

    Example:
        >>> study_options({"all": {}, "few": {"prompts": 4}}, {"prompts": 8, "epochs": 2}, print)
        prompts=8 holds in all; the study itself sets it in few.
        {'all': {'prompts': 8, 'epochs': 2}, 'few': {'prompts': 4, 'epochs': 2}}
    """
    for name, value in given.items():
        other = [label for label, own in settings.items() if own.get(name, value) != value]
        if other and all(name in own for own in settings.values()):
            raise UsageError(
                f"{name}={value!r} would count nowhere: the study itself sets it, in {', '.join(other)}. Leave it out."
            )
        if other:
            rest = [label for label in settings if label not in other]
            say(f"{name}={value!r} holds in {', '.join(rest)}; the study itself sets it in {', '.join(other)}.")
    return {label: {**given, **own} for label, own in settings.items()}


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation (n - 1) and 95 % interval of the mean (Student's t) over runs.

    Args:
        values: one per run; None where a run has no such figure.

    Returns:
        "mean", "std", "low", "high" (None from one run) and "runs"; None where a value is None.

    Example:
        >>> found = spread([0.5, 0.7])
        >>> round(found["mean"], 3), round(found["std"], 3), found["runs"]
        (0.6, 0.141, 2)
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean, count = statistics.fmean(known), len(known)
    if count == 1:
        return {"mean": mean, "std": None, "low": None, "high": None, "runs": 1}
    from scipy.stats import t

    std = statistics.stdev(known)
    half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half, "runs": count}
