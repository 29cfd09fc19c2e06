"""NegLabel: how much more an image looks like the known classes than like words far from all of them.

Jiang et al., "Negative label guided OOD detection with pretrained vision-language models", ICLR 2024; the
constants are those of its authors' released code. The words are those of `ood_core.words`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ood_core import check, functional
from ood_core.backbones.base import Backbone
from ood_core.detectors.zero_shot import ZeroShot
from ood_core.errors import DataError, UsageError
from ood_core.features import FeatureSet
from ood_core.prompts import fill
from ood_core.words import SHIPPED, file_numbers, read_words, spaced, words_of

__all__ = ["NegLabel", "neg_label", "select_negatives"]

log = logging.getLogger(__name__)

_NOUN = "the nice {}"

_PROMPTS_OF = {"nouns": _NOUN, "adjectives": "This is a {} photo"}
"""Word list -> prompt; users' files have the nouns'."""


# Cosines in memory at a time, below the 16 million that torch.quantile takes.
_COSINES = 2**22

# Prompts per call: the backbone keeps the features of its last calls in memory.
_PROMPTS = 1024


def neg_label(
    image: Tensor,
    text: Tensor,
    negatives: Tensor,
    *,
    logit_scale: float = 100.0,
    temperature: float = 1.0,
    groups: int = 100,
) -> Tensor:
    """The classes' share of the softmax over classes and negatives, averaged over groups of negatives.

    S = mean_g sum_c exp(s cos_c) / (sum_c exp(s cos_c) + sum_{m in g} exp(s cos_m)), s = logit_scale / temperature.

    Args:
        image: [N, d] unit norm.
        text: [C, d] unit norm, of the known classes.
        negatives: [M, d] unit norm; group g is the g-th run of M // groups rows, the M % groups last rows count
            in none.
        logit_scale: factor of the cosines, above 0.
        temperature: divides the scaled cosines, above 0.
        groups: 1 to M; 1 takes all negatives together.

    Returns:
        [N] in [0, 1].

    Raises:
        TypeError: not floating-point tensors, or `groups` no integer.
        ValueError: shapes that do not fit, NaN, a scale or temperature not above 0, fewer negatives than groups.

    Source: Jiang et al., ICLR 2024, with the grouping of the released code.

    Example:
        >>> neg_label(torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(3)[1:], logit_scale=1, groups=2)
        tensor([0.7311])
    """
    return _log_odds(image, text, negatives, logit_scale, temperature, groups).sigmoid().mean(-1)


def _log_odds(
    image: Tensor, text: Tensor, negatives: Tensor, logit_scale: float, temperature: float, groups: int
) -> Tensor:
    """Of the classes against each group of negatives, [N, groups]."""
    image, text, negatives = check.tensors(image=(image, "N d"), text=(text, "C d"), negatives=(negatives, "M d"))
    size = len(negatives) // check.integer("groups", groups, 1, len(negatives), "1 to the number of negatives")
    scale = _scale(logit_scale, temperature, image.dtype)
    known = (scale * (image @ text.T)).logsumexp(-1, keepdim=True)
    others = scale * (image @ negatives[: groups * size].T)
    return known - others.unflatten(-1, (groups, size)).logsumexp(-1)


def _scale(logit_scale: float, temperature: float, dtype: torch.dtype) -> float:
    scale = check.positive("logit_scale", logit_scale) / check.positive("temperature", temperature)
    # Scores are 0, 1/2 or 1 long before; a difference of two larger products could be infinity minus infinity.
    return min(scale, torch.finfo(dtype).max / 16)


def select_negatives(candidates: Tensor, text: Tensor, *, share: float = 0.15, quantile: float = 0.95) -> Tensor:
    """The candidates farthest from the known classes, distance = minus a quantile of the cosines to them.

    Args:
        candidates: [W, d] unit norm.
        text: [C, d] unit norm, of the known classes.
        share: of the candidates to keep, in (0, 1]: int(W * share) of them.
        quantile: of a candidate's C cosines, in [0, 1], interpolated linearly; near 1 it leaves out the few classes
            that are nearest.

    Returns:
        int64 [int(W * share)], indices from the farthest to the nearest; of equal ones the earlier comes first.

    Raises:
        TypeError: not floating-point tensors, or a share or quantile that is no number.
        ValueError: shapes that do not fit, NaN, a share or quantile out of range, or a share that keeps none.

    Source: the NegMining algorithm of Jiang et al., ICLR 2024.

    Example:
        >>> select_negatives(torch.eye(4), torch.eye(4)[:2], share=0.5)
        tensor([2, 3])
    """
    candidates, text = check.tensors(candidates=(candidates, "W d"), text=(text, "C d"))
    count = _kept(len(candidates), _proportion("share", share))
    quantile = _proportion("quantile", quantile, zero=True)
    parts = candidates.split(max(1, _COSINES // len(text)))
    nearness = torch.cat([torch.quantile(part @ text.T, quantile, dim=-1) for part in parts])
    return nearness.argsort(stable=True)[:count]


def _proportion(name: str, value: Any, *, zero: bool = False) -> float:
    if not (zero and value == 0):
        check.positive(name, value)
    if value > 1:
        raise ValueError(f"{name}={value} must be at most 1, which is all of them.")
    return float(value)


def _kept(candidates: int, share: float) -> int:
    count = int(candidates * share)
    if not count:
        raise ValueError(f"share={share} of {candidates} candidates keeps none: raise share or give more words.")
    return count


class NegLabel(ZeroShot):
    """NegLabel: the known classes against mined negative words.

    The words are encoded and chosen when a backbone is attached; the 70,000 of WordNet take a while on a CPU
    (`max_words` takes fewer), and their features are saved with the detector. A word that is too long for the text
    tower is cut by its tokenizer.

    Args:
        logit_scale: factor of the cosines; None is the backbone's own.
        temperature: divides the scaled cosines.
        share: of each word list that becomes negatives, the farthest from the classes, in (0, 1].
        groups: of negatives whose scores are averaged; negatives beyond a multiple of it are dropped.
        words: word lists: "nouns", "adjectives" or text files with one word per line; None is the first two. From
            each, `share` is chosen apart.
        exclude: WordNet's lexicographer files to leave out, by name or number.
        max_words: words to encode of each list, evenly spaced; None is all.
        seed: of the permutation that deals the negatives to groups.
        **common: see `create_detector`.

    Attributes:
        negative_words: the M words chosen, in the order of the rows of `state["negatives"]`.

    Source: Jiang et al., ICLR 2024; prompts and defaults are the released code's.

    Example:
        >>> from ood_core import create_detector
        >>> detector = create_detector(
        ...     "neg_label", backbone="tiny", class_names=["dog", "cat"], max_words=2000
        ... )  # doctest: +SKIP
        >>> detector.score("photos/")  # doctest: +SKIP
    """

    name = "neg_label"
    least_classes: ClassVar[int] = 1  # beside the negatives
    default_template = _NOUN
    fit_options = frozenset({"share", "groups", "words", "exclude", "max_words", "seed"})
    # Encoding is what takes long; fewer groups, so that each still has dozens of negatives.
    demo_options: ClassVar[Mapping[str, Any]] = {"max_words": 500, "groups": 5}

    def __init__(
        self,
        *,
        logit_scale: float | None = None,
        temperature: float = 1.0,
        share: float = 0.15,
        groups: int = 100,
        words: Sequence[str | Path] | None = None,
        exclude: Sequence[str | int] = ("noun.animal", "noun.food"),
        max_words: int | None = None,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.logit_scale = logit_scale if logit_scale is None else check.positive("logit_scale", logit_scale)
        self.temperature = check.positive("temperature", temperature)
        self.share = _proportion("share", share)
        self.groups = check.integer("groups", groups, 1, 2**31)
        self.words = words if words is None else _word_lists(words)
        file_numbers(exclude)
        self.exclude = list(exclude)
        self.max_words = max_words if max_words is None else check.integer("max_words", max_words, 1, 2**31)
        self.seed = check.integer("seed", seed, 0, 2**31)
        self.negative_words: list[str] = []

    @property
    def fitted(self) -> bool:
        """Whether the class texts and the negatives are encoded."""
        return "negatives" in self.state

    def _score(self, features: FeatureSet) -> Tensor:
        negatives = self.state["negatives"].to(features.image.device)
        scale = self.logit_scale or float(self.state["logit_scale"])
        odds = _log_odds(features.image, self._text(features), negatives, scale, self.temperature, self.groups)
        # float32 rounds clear cases to 1: what remains is averaged instead (see `functional.unsaturated`).
        remaining = logsigmoid(-odds).logsumexp(-1) - math.log(self.groups)
        return functional.unsaturated(odds.sigmoid().mean(-1), remaining)

    # ---- mining

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        if not self.fitted:
            self._mine(backbone)

    def _mine(self, backbone: Backbone) -> None:
        candidates = self._candidates()
        count = self._whole_groups(sum(_kept(len(words), self.share) for words in candidates.values()))
        chosen = [self._choose(backbone, name, words) for name, words in candidates.items()]
        words = [word for part, _ in chosen for word in part]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        self.negative_words = [words[index] for index in order.tolist()]
        self.state["logit_scale"] = torch.tensor(float(backbone.logit_scale))
        self.state["negatives"] = torch.cat([features for _, features in chosen])[order]

    def _candidates(self) -> dict[str, list[str]]:
        """The words to encode of every list; none is a class name or in an earlier list."""
        known = {spaced(one).casefold() for one in self.class_names}
        found: dict[str, list[str]] = {}
        for name in self.words or SHIPPED:
            words = [word for word in read_words(name, self.exclude) if word.casefold() not in known]
            if not words:
                raise DataError(f"Every word of {name} is a class name or in an earlier list: give other words.")
            known |= {word.casefold() for word in words}
            found[name] = _spread(words, self.max_words)
        return found

    def _whole_groups(self, count: int) -> int:
        """The negatives that remain when the groups are filled evenly."""
        if count < self.groups:
            raise UsageError(
                f"groups={self.groups} is more than the {count} negatives that share={self.share} of the words gives: "
                "lower groups, or raise share or max_words."
            )
        return count - count % self.groups

    def _choose(self, backbone: Backbone, name: str, words: list[str]) -> tuple[list[str], Tensor]:
        """The farthest words of one list, farthest first, and their features."""
        features = _encode(backbone, [fill(_PROMPTS_OF.get(name, _NOUN), word) for word in words], name)
        index = select_negatives(features, self.state["text"], share=self.share)
        return [words[i] for i in index.tolist()], features[index]

    # ---- storage

    def _files(self) -> dict[str, Callable[[Path], Any]]:
        """The negatives' words, to be read."""
        text = "".join(f"{word}\n" for word in self.negative_words)
        return {"negatives.txt": lambda path: path.write_text(text, encoding="utf-8")}

    @classmethod
    def _empty(cls, path: Path, config: dict[str, Any]) -> Self:
        made = super()._empty(path, config)
        file = path / "negatives.txt"
        if file.is_file():  # a repository on the hub is fetched without it
            made.negative_words = words_of(file)
        return made


def _word_lists(words: Sequence[str | Path]) -> list[str]:
    if isinstance(words, str | Path):
        raise TypeError(f"words must be a list of word lists, got {str(words)!r}: write [{str(words)!r}].")
    if not words:
        raise UsageError("words=[] leaves no candidates: name 'nouns', 'adjectives' or text files, or give None.")
    return list(dict.fromkeys(str(one) for one in words))


def _spread(words: list[str], most: int | None) -> list[str]:
    """At most so many of the words, evenly spaced, the first among them."""
    if most is None or most >= len(words):
        return words
    return [words[i * len(words) // most] for i in range(most)]


def _encode(backbone: Backbone, prompts: list[str], name: str) -> Tensor:
    """Features [W, d] on the CPU."""
    # Prompts of like length together: little is padded.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    parts = []
    for start in range(0, len(order), _PROMPTS):
        parts.append(backbone.encode_text([prompts[index] for index in order[start : start + _PROMPTS]]).cpu())
        log.info("neg_label: %d of %d prompts of %s encoded.", min(start + _PROMPTS, len(order)), len(order), name)
    return torch.cat(parts)[torch.tensor(order).argsort()]
