"""One score from several detectors, each brought to the same scale on ID images only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from ood_core import check, evaluation
from ood_core.backbones.base import Backbone
from ood_core.calibration import (
    LEAST_CALIBRATION,
    Calibration,
    check_enough,
    check_tpr,
    conformal_p_values,
    features_hash,
    leave_one_out_p_values,
    scores_hash,
)
from ood_core.combination import cauchy, fisher, log_p_correlation, robust_z_score, weighted_mean, z_score
from ood_core.data.sources import Images
from ood_core.detectors.base import Detector
from ood_core.detectors.given import Data, Observed, as_float32, holds_images
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.features import FeatureSet
from ood_core.scores import ScoreTable

__all__ = ["COMBINE", "NORMALIZE", "Fusion", "ScoreColumn"]

NORMALIZE = ("p_value", "z_score", "robust")
COMBINE = ("mean", "max", "min", "fisher", "cauchy", "stacking")

# What fusions saved by earlier versions call them.
_FORMER = {"ecdf": "p_value", "zscore": "z_score"}
_WEIGHTED = ("mean", "fisher", "cauchy")
_SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "p_value": conformal_p_values,
    "z_score": z_score,
    "robust": robust_z_score,
}
_STACKING = "(stacking)"


class ScoreColumn(Detector):
    """A member of a `Fusion` whose scores come from a score table.

    Args:
        **common: see `create_detector`.
    """

    name = "score_column"
    remedy = "give score tables"
    blind = "A fusion of score table columns sees no images: use score_table(table) or `ood fuse`."

    @property
    def needs(self) -> frozenset[str]:
        """Nothing of a backbone."""
        return frozenset()

    @property
    def fitted(self) -> bool:
        """Always: somebody else has scored."""
        return True

    def _score(self, features: FeatureSet) -> Tensor:
        raise UsageError("it is a column of a score table: use score_table(table), or `ood fuse FILE.parquet ...`.")

    def attach(self, backbone: Backbone | str) -> None:
        """Has no use for one."""


class Fusion(Detector):
    """Several detectors as one; they may come from several packages and have several backbones.

    `fit` fits the members that need it. `calibrate` learns every member's ID distribution and then the threshold of
    the combined score. Data may be images, features of the members' one backbone, a list of features with one
    `FeatureSet` per backbone, or member scores by name; `calibrate` and `score_table` take score tables, too.

    Decisions keep their error rates although the same images set the scales and the threshold: with "p_value" each
    calibration image is ranked among the others only, which makes "mean", "max", "min" and "cauchy" exact (never more
    false alarms than stated). "z_score", "robust" and the correlations of "fisher" leave an error of order 1 / n.

    Args:
        members: detectors, or name -> detector; a string stands for a column of score tables.
        normalize: "p_value" (conformal, from the ranks), "z_score" or "robust" (median and MAD), on ID images only.
        combine: "mean", "max" or "min" of the normalised scores; "fisher" (with Brown's correction for dependence,
            its correlations estimated on the calibration images) or "cauchy": logarithm of the combined p-value;
            "stacking": logistic regression, which learns from labelled OOD images (`fit_stacking`) and says so.
        weights: member -> weight, for "mean", "fisher" and "cauchy"; None for equal ones.

    Attributes:
        labelled_ood: number and hash of the OOD images that stacking learned from; None for all other fusions.

    Raises:
        UsageError: fewer than two members, two of the same name, options that do not fit each other.

    Example:
        >>> fused = Fusion([create_detector("mcm", ...), create_detector("knn", ...)])  # doctest: +SKIP
        >>> fused.fit(train).calibrate(val).is_ood(test)  # doctest: +SKIP
        >>> fused = Fusion(["mcm", "knn"], combine="fisher").calibrate(ScoreTable.read("val.parquet"))  # doctest: +SKIP
        >>> fused.score_table(ScoreTable.read("test.parquet"))  # doctest: +SKIP
    """

    name = "fusion"

    def __init__(
        self,
        members: Sequence[Detector | str] | Mapping[str, Detector],
        *,
        normalize: str = "p_value",
        combine: str = "mean",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        named = dict(members) if isinstance(members, Mapping) else dict(map(_named, members))
        if len(named) < 2 or len(named) != len(members):
            raise UsageError(f"Fusion needs two or more detectors of different names, got {[*named]}.")
        self.members = named
        self.normalize = check.choice("normalize", _FORMER.get(normalize, normalize), NORMALIZE)
        self.combine = check.choice("combine", combine, COMBINE)
        self.weights = None if weights is None else _checked_weights(weights, list(named), combine)
        self.labelled_ood: dict[str, Any] | None = None
        if combine in ("fisher", "cauchy") and self.normalize != "p_value":
            raise UsageError(f"combine={combine!r} combines p-values: use normalize='p_value', not {normalize!r}.")

    @property
    def needs(self) -> frozenset[str]:
        """What the members need together."""
        return frozenset[str]().union(*(member.needs for member in self.members.values()))

    @property
    def fitted(self) -> bool:
        """Whether every member can score."""
        return all(member.fitted for member in self.members.values())

    @property
    def backbone(self) -> Backbone | None:
        """The backbone of the first member that has one."""
        return next((member.backbone for member in self.members.values() if member.backbone), None)

    @property
    def stamps(self) -> dict[str, Any]:
        """Members, and the labelled OOD images if any were used."""
        learned = {} if self.labelled_ood is None else {"labelled_ood": self.labelled_ood}
        return {"members": list(self.members), **learned}

    def fit(self, data: Data, **extraction: Any) -> Self:
        """Fit the members that need it; forgets an earlier calibration.

        Args:
            data: labelled ID images, or features of them.
            **extraction: for `extract`, with images.

        Raises:
            UsageError: features that lack what a member needs, or of another backbone.
            DataError: labels that are missing or unknown.
        """
        evaluation.fit_detectors({self.name: self}, data, **extraction)
        self.calibration = None
        return self

    def fit_features(self, features: FeatureSet) -> Self:
        """`fit`."""
        return self.fit(features)

    def fit_images(self, images: Images, **options: Any) -> Self:
        """`fit`."""
        return self.fit(images, **options)

    # ---- scores

    def score_features(self, features: Any) -> Tensor:
        """Fused scores, float32 [N].

        Args:
            features: of the members' one backbone, or a list with one `FeatureSet` per backbone.

        Raises:
            NotFittedError: before `calibrate`, or before a member is fitted.
            UsageError: features of other backbones, or without what a member needs.
            DataError: a member that fails; the message names it.
        """
        return self.combine_scores(self._member_scores(features)[0])

    def score(self, images: Any, **options: Any) -> Tensor:
        """Fused scores of images, float32 [N], encoded once per backbone (see `Detector.score`)."""
        return self.combine_scores(self._member_scores(images, **options)[0])

    def score_table(self, table: ScoreTable, *, name: str = "fusion") -> ScoreTable:
        """The table with one more column, from the columns that are named as the members.

        Images without a score of every member get no fused score.

        Raises:
            UsageError: no column for a member, or one named `name` already.
        """
        if name in table.frame:
            raise UsageError(f"The score table has a column {name!r} already: choose another name.")
        parts = table.select(self.members).frame
        complete = ((parts["status"] == "ok") & parts[[*self.members]].notna().all(axis=1)).to_numpy()
        fused = np.full(len(parts), np.nan, dtype=np.float32)
        if complete.any():
            fused[complete] = self.combine_scores(_columns(parts[complete], self.members)).numpy()
        return ScoreTable(table.frame.assign(**{name: fused}))

    def combine_scores(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Fused scores, float32 [N], from the members' own.

        Args:
            scores: member -> [N].

        Raises:
            NotFittedError: before `calibrate`.
            DataError: a member whose scores hold NaN; the message names it.
        """
        if not self.state:
            raise NotFittedError("The fusion does not know its members' ID scores: call calibrate(id_features) first.")
        scores = self._checked(scores)
        return self._combined(torch.stack([self._normalized(name, scores[name]) for name in self.members]))

    def predict(self, features: Any) -> None:
        """A fusion does not classify."""

    def _score(self, features: FeatureSet) -> Tensor:
        return self.score_features(features)

    def _assemble(self, of: Callable[[Detector], Tensor]) -> Tensor:
        return self.combine_scores(self._from_leaves(of))

    def _from_leaves(self, of: Callable[[Detector], Tensor]) -> dict[str, Tensor]:
        return {name: member._assemble(of) for name, member in self.members.items()}

    def _member_scores(self, data: Any, **extraction: Any) -> tuple[dict[str, Tensor], str]:
        """Each member's scores of the same images, and the hash of these."""
        if isinstance(data, Mapping):
            scores = self._checked(data)
            return scores, scores_hash(torch.cat(list(scores.values())))
        found = evaluation.score_leaves([self], data, **extraction)
        ids = found.rows.frame.loc[found.rows.frame["status"] == "ok", "id"]
        return self._from_leaves(found.scores.__getitem__), features_hash(found.counts["fingerprint"], ids)

    def _checked(self, scores: Mapping[str, Any]) -> dict[str, Tensor]:
        """The members' scores as vectors of one length, without NaN."""
        if missing := [name for name in self.members if name not in scores]:
            raise UsageError(f"There are no scores of member {missing[0]!r}, only of {list(scores)}.")
        vectors = {name: as_float32(scores[name]) for name in self.members}
        lengths = {name: list(values.shape) for name, values in vectors.items()}
        if len(set(map(tuple, lengths.values()))) > 1 or len(next(iter(lengths.values()))) != 1:
            raise UsageError(f"The members' scores must be vectors of one length, got {lengths}.")
        for name, values in vectors.items():
            if values.isnan().any():
                count = int(values.isnan().sum())
                raise DataError(f"Member {name!r} gives no number (NaN) for {count} of {len(values)} images.")
        return vectors

    # ---- one scale, one score

    def _normalized(self, name: str, scores: Tensor) -> Tensor:
        with _named_member(name, self.normalize):
            return _SCALES[self.normalize](scores, self.state[name])

    def _normalized_reference(self) -> Tensor:
        """The calibration images' own normalised scores [M, n]: ranked among the others, as a new image is."""
        references = {name: self.state[name] for name in self.members}
        if self.normalize == "p_value":
            return torch.stack([leave_one_out_p_values(scores) for scores in references.values()])
        return torch.stack([self._normalized(name, scores) for name, scores in references.items()])

    @property
    def _count(self) -> int:
        """Number of calibration images."""
        return len(self.state[next(iter(self.members))])

    def _combined(self, values: Tensor) -> Tensor:
        """Float32 [N] of normalised scores [M, N]."""
        if self.combine in ("max", "min"):
            fused = values.amax(0) if self.combine == "max" else values.amin(0)
        elif self.combine == "mean":
            fused = weighted_mean(values, self._weights())
        elif self.combine == "stacking":
            fused = self._stacked(values)
        else:
            fused = self._combined_p_value(values).clamp(min=1e-300).log()
        return fused.float()

    def _combined_p_value(self, p_values: Tensor) -> Tensor:
        if self.combine == "fisher":
            correlation = log_p_correlation(self._normalized_reference())
            return fisher(p_values, correlation=correlation, weights=self._weights())
        # The highest score of all would be 1, which outweighs any number of small p-values.
        largest = 1 - 0.5 / (self._count + 1)
        return cauchy(p_values.clamp(max=largest), weights=self._weights())

    def _weights(self) -> Tensor | None:
        return None if self.weights is None else torch.tensor([self.weights[name] for name in self.members]).double()

    # ---- calibration

    def calibrate(self, id_scores: Any, tpr: float = 0.95, *, allow_overlap: bool = False, **extraction: Any) -> Self:
        """Learn the members' ID distributions, then the threshold (see `Detector.calibrate`).

        Args:
            id_scores: at least 20 ID images that no member was fitted on, or their features, or their scores: a
                score table (of one set, or with a set "id") or member -> scores.
            tpr: share of them to accept.
            allow_overlap: take images that a member was fitted on, too (see `Detector.calibrate`).
            **extraction: for `extract`, with images.

        Raises:
            DataError: a member that fails, whose scores are constant or that was fitted on these images; the message
                names it.
            NotFittedError: "stacking" before `fit_stacking`.
        """
        check_tpr(tpr)
        self._check_stacked()
        if not allow_overlap:
            self._check_held_out(id_scores)
        for member in self._inner_fusions().values():
            member.calibrate(id_scores, tpr, allow_overlap=True, **extraction)
        scores, data_hash = self._given_scores(id_scores, ood=False, **extraction)
        return self._calibrate_on(scores, tpr, data_hash)

    def _calibrate_members(self, of: Callable[[Detector], Tensor], tpr: float, data_hash: str) -> None:
        """Calibrate on scores of its leaves; inner fusions first."""
        self._check_stacked()
        for member in self._inner_fusions().values():
            member._calibrate_members(of, tpr, data_hash)
        self._calibrate_on(self._from_leaves(of), tpr, data_hash)

    def _inner_fusions(self) -> dict[str, Fusion]:
        """Members that need to be calibrated before they can score."""
        return {
            name: member for name, member in self.members.items() if isinstance(member, Fusion) and not member.state
        }

    def _calibrate_on(self, scores: Mapping[str, Tensor], tpr: float, data_hash: str) -> Self:
        self._learn_scales(scores)
        self.calibration = Calibration.of(self._combined(self._normalized_reference()), tpr, data_hash=data_hash)
        return self

    def _learn_scales(self, scores: Mapping[str, Tensor]) -> None:
        scores = self._checked(scores)
        for name, values in scores.items():
            check_enough(len(values))
            if not values.isfinite().all():
                count = int((~values.isfinite()).sum())
                raise DataError(f"Member {name!r} gives {count} infinite scores to calibration images: leave it out.")
            if not values.std() > 0:
                raise DataError(f"Member {name!r} gives every calibration image the same score: leave it out.")
        self.state |= scores

    def _given_scores(self, data: Any, *, ood: bool, **extraction: Any) -> tuple[dict[str, Tensor], str]:
        """Member scores of calibration data, which may also be a score table."""
        if not isinstance(data, ScoreTable):
            return self._member_scores(data, **extraction)
        rows = _rows_of(data.select(self.members), self.members, ood=ood)
        return _columns(rows, self.members), features_hash("", list(rows["id"]))

    def _observe(self, data: Any, *, classify: bool = False) -> Observed:
        if isinstance(data, Mapping) or evaluation.is_features(data) or holds_images(data):
            scores, data_hash = self._member_scores(data)
            return Observed(self.combine_scores(scores), None, data_hash)
        if isinstance(data, ScoreTable):
            raise UsageError("Score the table first (score_table), then decide on its scores.")
        return super()._observe(data, classify=classify)

    # ---- stacking

    def fit_stacking(self, id: Any, ood: Any, *, l2: float = 1e-3, **extraction: Any) -> Self:
        """Learn how to weigh the members from labelled OOD images (logistic regression of their normalised scores).

        All other fusions know OOD images only when they meet them. This one has seen some: `labelled_ood` and every
        result say so, and it may do worse on other kinds of OOD images. Calibrate afterwards, on other ID images.

        Args:
            id: ID images, features or scores (see `calibrate`).
            ood: OOD images, features or scores; of a score table all sets but "id".
            l2: strength of the penalty, see `ood_core.logistic.fit_logistic`.
            **extraction: for `extract`, with images.

        Raises:
            UsageError: `combine` is not "stacking".
            DataError: fewer than 20 images of either kind, or a member that fails or is constant on ID images.

        Example:
            >>> Fusion([a, b], combine="stacking").fit_stacking(val, known_ood).calibrate(other)  # doctest: +SKIP
        """
        from ood_core.logistic import fit_logistic

        if self.combine != "stacking":
            raise UsageError(f"Only combine='stacking' learns from OOD images, not combine={self.combine!r}.")
        known, _ = self._given_scores(id, ood=False, **extraction)
        unknown, data_hash = self._given_scores(ood, ood=True, **extraction)
        unknown = self._checked(unknown)
        self._learn_scales(known)
        count = len(next(iter(unknown.values())))
        if count < LEAST_CALIBRATION:
            raise DataError(f"{count} OOD images are too few to learn from: give at least {LEAST_CALIBRATION}.")
        outside = torch.stack([self._normalized(name, unknown[name]) for name in self.members])
        x = torch.cat([self._normalized_reference(), outside], 1).T
        is_id = (torch.arange(len(x)) < len(x) - count).long()
        weight, bias = fit_logistic(x, is_id, 2, l2=l2)
        self.state[_STACKING] = torch.cat([weight[1] - weight[0], (bias[1] - bias[0])[None]])
        self.labelled_ood = {"images": count, "data_hash": data_hash}
        self.calibration = None
        return self

    def _stacked(self, values: Tensor) -> Tensor:
        self._check_stacked()
        learned = self.state[_STACKING].double()
        return learned[:-1] @ values + learned[-1]

    def _check_stacked(self) -> None:
        if self.combine == "stacking" and _STACKING not in self.state:
            raise NotFittedError("Stacking learns from labelled OOD images: call fit_stacking(id, ood) first.")

    # ---- options and storage

    @classmethod
    def option_names(cls) -> list[str]:
        """All but the members."""
        return ["normalize", "combine", "weights"]

    def set_params(self, **params: Any) -> Self:
        """Change options; the threshold is dropped, and what stacking learned.

        Raises:
            UsageError: an unknown option, or options that do not fit each other.
        """
        super().set_params(**params)
        self.state.pop(_STACKING, None)
        self.labelled_ood = None
        return self

    def _with_params(self, params: dict[str, Any]) -> Self:
        return type(self)(self.members, **params)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "members": list(self.members), "labelled_ood": self.labelled_ood}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fusion and its members (subfolders `members/NAME`)."""
        for name, member in self.members.items():
            member.save_pretrained(_member_folder(Path(folder), name))
        super().save_pretrained(folder)

    @classmethod
    def _empty(cls, path: Path, config: dict[str, Any]) -> Self:
        # Fusions saved by earlier versions do not list their members.
        names = config.get("members") or sorted(unquote(folder.name) for folder in (path / "members").iterdir())
        made = cls({name: Detector.from_pretrained(_member_folder(path, name)) for name in names}, **config["params"])
        made.labelled_ood = config.get("labelled_ood")
        return made

    def attach(self, backbone: Backbone | str) -> None:
        """Give every member this backbone."""
        for member in self.members.values():
            member.attach(backbone)


def _named(member: Detector | str) -> tuple[str, Detector]:
    return (member, ScoreColumn()) if isinstance(member, str) else (member.name, member)


def _member_folder(folder: Path, name: str) -> Path:
    """Names may hold "/" (columns of score tables): one folder each, whatever the name."""
    return folder / "members" / quote(name, safe=" ").replace(".", "%2E")


def _checked_weights(weights: Mapping[str, float], members: list[str], combine: str) -> dict[str, float]:
    if combine not in _WEIGHTED:
        raise UsageError(f"combine={combine!r} takes no weights; {', '.join(map(repr, _WEIGHTED))} do.")
    if set(weights) != set(members):
        raise UsageError(f"weights must name every member once, {members}; got {list(weights)}.")
    values = {name: float(weights[name]) for name in members}
    if not all(0 <= value < float("inf") for value in values.values()) or not any(values.values()):
        raise UsageError(f"weights={values} must be finite, not negative and not all 0.")
    return values


@contextmanager
def _named_member(name: str, normalize: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(
            f"Member {name!r} cannot be brought to the scale {normalize!r}: {error} Use normalize='p_value', or leave "
            "it out."
        ) from error


def _columns(frame: Any, names: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(frame[name].to_numpy(np.float32, copy=True)) for name in names}


def _rows_of(table: ScoreTable, members: Mapping[str, Any], *, ood: bool) -> Any:
    """Rows of a table that hold the ID images, or the OOD images, with a score by every member."""
    sources = [name for name in table.sources if (name == "id") != ood]
    if not ood and not sources and len(table.sources) == 1:
        sources = table.sources
    if not sources:
        wanted = "no set but 'id'" if ood else "no set 'id' among its several sets"
        raise UsageError(f"The score table has {wanted}: it holds {table.sources}.")
    frame = table.frame[table.frame["source"].isin(sources) & (table.frame["status"] == "ok")]
    return frame[frame[[*members]].notna().all(axis=1)]
