import importlib
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ood_core.detectors.base import Detector
from ood_core.errors import NotFittedError, UsageError
from ood_core.features import FeatureSet
from ood_iim.functional import s_mcm
from ood_iim.s_mcm import SMCM

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def features(images=30, patches=16, width=6):
    return FeatureSet(
        ids=[f"{i:03}.png" for i in range(images)],
        image=unit(images, width, seed=1),
        local=unit(images, patches, width, seed=2),
    )


def detector(**options):
    made = SMCM(class_names=["dog", "cat", "owl"], **options)
    made.state["text"] = unit(3, 6, seed=3)
    return made


@pytest.mark.parametrize(("patches", "k"), [(1, 1), (16, 4), (99, 24), (100, 50)])
def test_scores_are_s_mcm_without_negatives(patches, k):
    data, made = features(5, patches), detector(temperature=0.5, alpha=0.8)
    text = made.state["text"]
    expected = s_mcm(data.image, data.local, text, text, k=k, temperature=0.5, alpha=0.8)
    scores = made.score_features(data)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected)


def test_a_given_k_is_used_and_defaults_are_the_papers():
    data, made = features(5), detector(k=9)
    text = made.state["text"]
    torch.testing.assert_close(made.score_features(data), s_mcm(data.image, data.local, text, text, k=9))
    assert detector().get_params() == {"k": None, "temperature": 1.0, "alpha": 1.0}
    assert SMCM.default_template == "a photo of a {}"


def test_matching_images_score_higher_than_others():
    made, width = detector(), 6
    text = made.state["text"]
    outside = torch.linalg.svd(text).Vh[-1]  # orthogonal to every class
    image = torch.cat([text, outside.expand(3, width)])
    data = FeatureSet(ids=list("abcdef"), image=image, local=image[:, None].repeat(1, 16, 1))
    scores = made.score_features(data)
    assert scores[:3].min() > scores[3:].max()


def test_calibration_keeps_its_share_and_is_dropped_by_new_options():
    data, made = features(), detector()
    assert (~made.calibrate(data, tpr=0.9).is_ood(data)).float().mean() >= 0.9
    made.set_params(alpha=0.0)
    assert made.alpha == 0
    assert made.fitted  # the class texts do not depend on the options
    with pytest.raises(NotFittedError, match="calibrate"):
        made.is_ood(data)


def test_needs_and_capabilities():
    made = detector()
    assert made.needs == {"image", "local"}
    assert made.capabilities == {"image", "local", "text"}
    with pytest.raises(UsageError, match="'local'"):
        made.score_features(FeatureSet(ids=["a"], image=unit(1, 6, seed=1)))
    with pytest.raises(NotFittedError, match="class_names"):
        SMCM(class_names=["dog", "cat"]).score_features(features(2))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": 0}, ValueError, "k=0"),
        ({"k": "many"}, TypeError, "'many'"),
        ({"temperature": 0}, ValueError, "temperature=0"),
        ({"alpha": -1}, ValueError, "alpha=-1"),
        ({"alpha": None}, TypeError, "None"),
        ({"class_names": "dog"}, TypeError, "'dog'"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        SMCM(**options)


def test_k_beyond_the_entries_of_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"k=49 is outside \[1, 48\]"):
        detector(k=49).score_features(features(2, 16))


def test_entry_points_name_detectors_of_their_own_name():
    entries = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["ood.detectors"]
    for name, target in entries.items():
        module, _, attribute = target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert issubclass(found, Detector)
        assert found.name == name
    assert entries["s_mcm"] == "ood_iim.s_mcm:SMCM"
