"""The detectors of this package keep to what every detector keeps to."""

import pytest
from ood_core.testing import detector_checks

DETECTORS = [
    "energy", "gen", "gl_mcm", "knn", "linear_probe", "mahalanobis", "max_logit", "mcm", "msp", "r_mcm", "vim",
]  # fmt: skip
CHECKS = [check for name in DETECTORS for check in detector_checks(name)]
CHECKS += detector_checks("neg_label", max_words=60, groups=2)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conformance(check):
    check()
