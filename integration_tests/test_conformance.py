"""No registered detector is left out of the checks that its package runs, and of what every detector says."""

import importlib.util
from pathlib import Path

from ood_core import list_detectors
from ood_core.detectors import detector_class

ROOT = Path(__file__).parents[1]


def checks_of(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CHECKS


def test_every_registered_detector_is_checked():
    files = [*ROOT.glob("shared/tests/test_conformance.py"), *ROOT.glob("packages/*/tests/test_*_conformance.py")]
    assert {check.subject for file in files for check in checks_of(file)} == set(list_detectors())


def test_one_class_is_enough_only_where_the_score_is_no_softmax():
    enough = {name for name in list_detectors() if detector_class(name).least_classes < 2}
    assert enough == {"energy", "knn", "mahalanobis", "max_logit", "neg_label", "vim"}
