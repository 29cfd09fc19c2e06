"""The detectors of this package keep to what every detector keeps to."""

import pytest
from ood_core.testing import detector_checks

CHECKS = detector_checks("hvl", epochs=10)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conformance(check):
    check()
