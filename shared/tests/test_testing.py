"""The conformance suite finds what it is for: each of these breaks one promise, and that check says so."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from ood_core import create_backbone, create_detector
from ood_core.detectors import detector_class
from ood_core.testing import backbone_checks, check_backbone, check_detector, detector_checks

KNN = detector_class("knn")


def run(checks, name):
    (check,) = [check for check in checks if check.function.__name__ == name]
    check()


class OfItsBatch(KNN):
    def _score(self, features):
        scores = super()._score(features)
        return scores - scores.mean()


class Lower(KNN):
    def _score(self, features):
        return -super()._score(features)


class Column(KNN):
    def _score(self, features):
        return super()._score(features)[:, None]


class Writing(KNN):
    def _score(self, features):
        features.image.mul_(2)
        return super()._score(features)


class Drawing(KNN):
    def _fit(self, features):
        torch.rand(1)
        super()._fit(features)


class Remembering(KNN):
    def _fit(self, features):
        before = self.state.get("seen", torch.zeros(1))
        super()._fit(features)
        self.state["seen"] = before + 1


class Deaf(KNN):
    def set_params(self, **params):
        return self


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        (OfItsBatch, "a_score_depends_on_no_other_image", "must depend on no other image. Alone it moves"),
        (Lower, "known_images_score_higher_than_noise", "the AUROC against noise is 0"),
        (Column, "one_finite_score_per_image", r"24 images have scores of shape \[24, 1\]"),
        (Writing, "features_are_not_changed", "changed the features 'image'"),
        (Drawing, "a_fit_changes_nothing_outside", "must leave the random numbers as they were"),
        (Remembering, "a_fit_forgets_the_one_before", "model.safetensors: the first has left something"),
        (Deaf, "unknown_options_are_refused", "must raise UsageError, but nothing was raised"),
    ],
)
def test_a_broken_detector_is_found(kind, name, sentence):
    with pytest.raises(AssertionError, match=f"^knn-{name}: .*{sentence}"):
        run(detector_checks(kind, k=3), name)


@pytest.mark.parametrize("given", ["knn", KNN, partial(create_detector, "knn")])
def test_a_detector_may_be_given_by_name_class_or_function(given):
    check_detector(given, k=3)


def broken_backbone(**methods):
    backbone = create_backbone("tiny", dtype="float32")
    for name, function in methods.items():
        setattr(backbone, name, partial(function, backbone))
    return backbone


@pytest.mark.parametrize(
    ("methods", "name", "sentence"),
    [
        (
            {"encode_image": lambda self, x, normalize=True: self.encode(x, {"image"}, normalize=False)["image"]},
            "features_are_unit_vectors_in_float32",
            "'image' features must have unit norm",
        ),
        ({"prepare": lambda self, x: x}, "other_pixels_are_refused", "must raise ValueError"),
        ({"copy": lambda self: self}, "a_copy_is_independent", "must not change the original's fingerprint"),
        ({"encode_text": lambda self, texts, **_: torch.ones(len(texts), 192)}, "texts_are_unit_vectors_in_float32",
         "'text' features must have unit norm"),
    ],
)  # fmt: skip
def test_a_broken_backbone_is_found(methods, name, sentence):
    with pytest.raises(AssertionError, match=f"^tiny-{name}: .*{sentence}"):
        run(backbone_checks(broken_backbone(**methods)), name)


def test_a_backbone_may_be_given_as_an_object(small_backbone):
    check_backbone(small_backbone)
    check_detector("knn", backbone=create_backbone("tiny", dtype="float32"))


def test_no_test_runner_is_needed():
    code = "import sys; sys.modules['pytest'] = None; from ood_core.testing import check_detector"
    subprocess.run([sys.executable, "-c", code], check=True)
