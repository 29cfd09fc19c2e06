"""The detectors of this package keep to what every detector keeps to."""

import pytest
from ood_core.testing import detector_checks

CHECKS = detector_checks("mofe", epochs=1, experts=2, batch_size=12)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conformance(check):
    check()
