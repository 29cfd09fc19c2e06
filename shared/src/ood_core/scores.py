"""Score tables: one row per image, one column per detector, joined by id and never by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ood_core.errors import DataError, MissingDataError, UsageError, unknown_name
from ood_core.features import FeatureSet
from ood_core.files import write_atomically

__all__ = ["NO_ROW", "ScoreTable"]

NO_ROW = "no row with a score of"
"""Begins the status of images that a joined table lacks."""

_FIXED = ["id", "source", "label", "status"]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of images by detector.

    Attributes:
        frame: columns id, source ("id" for the ID test set, else the name of the OOD set), label (name or None),
            status ("ok" or why there is no score) and one float32 column per detector, NaN without a score. Other
            columns than of floating-point numbers are kept, and are no detector's.

    Example:
        >>> table = ScoreTable.read("scores.parquet")  # doctest: +SKIP
        >>> table.scores("mcm", "textures")  # doctest: +SKIP
    """

    frame: pd.DataFrame

    def __post_init__(self) -> None:
        if missing := [name for name in _FIXED if name not in self.frame]:
            raise DataError(f"A score table needs the columns {_FIXED}; {missing} are not there.")
        doubled = self.frame.duplicated(["source", "id"])
        if doubled.any():
            row = self.frame[doubled].iloc[0]
            raise DataError(f"Image {row['id']!r} of {row['source']!r} stands in the score table twice.")

    @classmethod
    def of(cls, features: FeatureSet, scores: Mapping[str, Iterable[float]], *, source: str = "id") -> ScoreTable:
        """Rows of one source: its scored images, then its failures.

        Args:
            features: what was scored.
            scores: detector name -> N scores in the order of `features`.
            source: name of the set.
        """
        names = np.array([*features.label_names, None], dtype=object)
        labels = np.full(len(features), -1) if features.labels is None else features.labels.numpy()
        good = pd.DataFrame({"id": features.ids, "source": source, "label": names[labels], "status": "ok"})
        for name, values in scores.items():
            good[name] = np.asarray(values, dtype=np.float32)
        bad = pd.DataFrame(features.failures, columns=["id", "status"]).assign(source=source, label=None)
        return cls(pd.concat([good, bad], ignore_index=True)[list(good.columns)] if len(bad) else good)

    @classmethod
    def concatenate(cls, tables: Iterable[ScoreTable]) -> ScoreTable:
        """One table of several sources."""
        return cls(pd.concat([table.frame for table in tables], ignore_index=True))

    @property
    def detectors(self) -> list[str]:
        """Names of the score columns: those of floating-point numbers."""
        others = {*_FIXED, *self.extras}
        return [name for name in self.frame.columns if name not in others]

    @property
    def extras(self) -> list[str]:
        """Names of the other columns that somebody has added, such as notes: text, integers, yes or no."""
        kinds = self.frame.dtypes.items()
        return [str(name) for name, kind in kinds if name not in _FIXED and not pd.api.types.is_float_dtype(kind)]

    @property
    def sources(self) -> list[str]:
        """Names of the sets, in order of appearance."""
        return list(dict.fromkeys(self.frame["source"]))

    def scores(self, detector: str, source: str) -> np.ndarray:
        """Scores of the images of a set that have one, float32.

        Raises:
            UsageError: an unknown detector or set.
        """
        if detector not in self.detectors:
            raise unknown_name("detector in this table", detector, self.detectors)
        if source not in self.sources:
            raise unknown_name("set in this table", source, self.sources)
        rows = (self.frame["source"] == source) & (self.frame["status"] == "ok")
        return self.frame.loc[rows, detector].dropna().to_numpy(np.float32)

    def select(self, detectors: Iterable[str]) -> ScoreTable:
        """The same rows with the columns of these detectors, in this order, behind those that are no detector's.

        Raises:
            UsageError: an unknown detector.
        """
        wanted = list(detectors)
        for name in wanted:
            if name not in self.detectors:
                raise unknown_name("detector in this table", name, self.detectors)
        return ScoreTable(self.frame[[*_FIXED, *self.extras, *wanted]])

    def join(self, other: ScoreTable, *, missing: str = "raise") -> ScoreTable:
        """The columns of both tables, rows matched by (source, id), in the order of this table.

        Of a column that is no detector's and stands in both, this table's is kept.

        Args:
            other: with other detectors.
            missing: "raise" at an image that stands in one table only, or "record" it: its row says in `status`
                which detectors' scores it lacks, and rows of `other` alone come last.

        Raises:
            DataError: an image that stands in one table only, or a detector that stands in both.
            UsageError: an unknown `missing`.
        """
        if missing not in ("raise", "record"):
            raise UsageError(f"missing={missing!r} must be 'raise' or 'record'.")
        if both := set(self.detectors) & set(other.detectors):
            raise DataError(f"Detector {sorted(both)[0]!r} stands in both tables: rename it in one.")
        keys = ["source", "id"]
        order = self.frame[keys].assign(_place=np.arange(len(self.frame)))
        joined = self.frame.merge(other.frame, on=keys, how="outer", indicator=True, suffixes=("", "_other"))
        joined = joined.merge(order, on=keys, how="left").sort_values("_place", kind="stable", ignore_index=True)
        if missing == "raise" and (alone := joined["_merge"] != "both").any():
            row = joined[alone].iloc[0]
            raise DataError(f"Image {row['id']!r} of {row['source']!r} stands in one of the two tables only.")
        joined["status"] = _joint_status(joined, self.detectors, other.detectors)
        here = joined["_merge"] != "right_only"
        joined["label"] = joined["label"].where(here, joined["label_other"])
        extras = dict.fromkeys([*self.extras, *other.extras])
        return ScoreTable(joined[[*_FIXED, *extras, *self.detectors, *other.detectors]])

    def write(self, path: str | Path) -> None:
        """Write parquet (atomic)."""
        write_atomically(Path(path), lambda temporary: self.frame.to_parquet(temporary, index=False))

    @classmethod
    def read(cls, path: str | Path) -> ScoreTable:
        """Read what `write` wrote.

        Raises:
            MissingDataError: no such file.
            DataError: not a score table.
        """
        if not Path(path).is_file():
            raise MissingDataError(f"No score table {path}.")
        try:
            frame = pd.read_parquet(path)
        except Exception as error:
            raise DataError(f"{path} is no readable parquet file ({error}).") from error
        return cls(frame)


def _joint_status(joined: pd.DataFrame, left: list[str], right: list[str]) -> pd.Series:
    """The first reason there is for having no score."""
    status = joined["status"].where(joined["status"] != "ok", joined["status_other"])
    for side, absent in (("left_only", right), ("right_only", left)):
        alone = joined["_merge"] == side
        reason = f"{NO_ROW} {', '.join(absent)}"
        kept = joined["status" if side == "left_only" else "status_other"]
        status = status.mask(alone, kept.where(kept != "ok", reason))
    return status
