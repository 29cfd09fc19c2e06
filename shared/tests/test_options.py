"""Options in groups: declared once, checked when made, taken whole or by their own names."""

from dataclasses import FrozenInstanceError, dataclass

import pytest
from ood_core import check
from ood_core.detectors.base import Detector
from ood_core.errors import UsageError
from ood_core.options import (
    Options,
    flat_options,
    groups_of,
    integer,
    method_options,
    one_of,
    option,
    option_names,
    optional,
)


@dataclass(frozen=True)
class Training(Options):
    """How it learns."""

    epochs: int = option(10, integer(1))
    rate: float = option(0.1, check.positive)
    crop: float = option(0.5, check.share)


@dataclass(frozen=True)
class Scoring(Options):
    """How it scores."""

    k: int | None = option(None, optional(integer(1)))
    form: str = option("paper", one_of("paper", "released"))
    notes: object = option(None)


@flat_options
def fit(data, *, training: Training = Training(), scoring: Scoring = Scoring(), seed=0):
    return data, training, scoring, seed


class Grouped(Detector):
    name = "grouped"

    @flat_options
    def __init__(self, *, training: Training = Training(), scoring: Scoring = Scoring(), seed=0, **common):
        super().__init__(**common)
        self.training, self.scoring, self.seed = training, scoring, seed

    def _score(self, features):
        return features.image[:, 0]


@pytest.mark.parametrize(
    ("group", "value", "sentence"),
    [
        (Training, {"epochs": 0}, r"epochs=0 is outside \[1, 2147483648\]"),
        (Training, {"epochs": 1.5}, "epochs must be an integer, got 1.5"),
        (Training, {"rate": -1}, "rate=-1 must be a finite number above 0"),
        (Training, {"crop": 1.5}, "crop=1.5 must be at most 1, the whole"),
        (Scoring, {"k": 0}, r"k=0 is outside"),
        (Scoring, {"form": "mine"}, "form='mine' must be one of 'paper', 'released'"),
    ],
)
def test_every_option_is_checked_whichever_way_it_comes(group, value, sentence):
    for make in (group, lambda **options: fit(None, **options), lambda **options: Grouped(**options)):
        with pytest.raises((TypeError, ValueError), match=sentence):
            make(**value)


def test_a_group_cannot_be_changed_and_keeps_what_its_check_returns():
    made = Training(rate=1)
    assert isinstance(made.rate, float)
    with pytest.raises(FrozenInstanceError):
        made.rate = 2.0


@pytest.mark.parametrize("taker", [fit, lambda _, **options: (None, *vars_of(Grouped(**options)))])
def test_groups_and_flat_names_say_the_same(taker):
    whole = taker(None, training=Training(epochs=3, rate=0.2), scoring=Scoring(k=4), seed=7)
    assert taker(None, epochs=3, rate=0.2, k=4, seed=7) == whole
    assert taker(None) == (None, Training(), Scoring(), 0)


def vars_of(detector):
    return detector.training, detector.scoring, detector.seed


def test_an_option_beside_its_group_is_refused():
    with pytest.raises(UsageError, match=r"epochs= is an option of training=: give one of the two"):
        fit(None, epochs=3, training=Training())
    assert fit(None, epochs=3, scoring=Scoring(k=2))[1:3] == (Training(epochs=3), Scoring(k=2))


@pytest.mark.parametrize(("call", "of"), [(lambda **o: fit(None, **o), "fit"), (Grouped, "'grouped'")])
def test_unknown_names_get_the_nearest_ones(call, of):
    with pytest.raises(UsageError, match=rf"Unknown option of {of} 'epoch'. Did you mean 'epochs'"):
        call(epoch=3)


def test_names_are_flat_and_in_order():
    assert option_names(fit, "data") == ["epochs", "rate", "crop", "k", "form", "notes", "seed"]
    assert method_options(Grouped) == option_names(fit, "data")
    assert groups_of(fit) == {"training": Training(), "scoring": Scoring()}


def test_a_detector_reads_gets_and_sets_its_options_by_their_own_names():
    detector = Grouped(epochs=3, seed=2)
    assert (detector.epochs, detector.form, detector.seed) == (3, "paper", 2)
    detector.set_params(k=5, seed=4)
    expected = {"epochs": 3, "rate": 0.1, "crop": 0.5, "k": 5, "form": "paper", "notes": None, "seed": 4}
    assert detector.get_params() == expected
    assert detector.scoring == Scoring(k=5)
    with pytest.raises(ValueError, match="k=0"):
        detector.set_params(k=0)
    assert detector.k == 5
    detector.k = 6
    assert detector.scoring == Scoring(k=6)
