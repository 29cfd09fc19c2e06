"""The detectors of this package keep to what every detector keeps to."""

import pytest
from ood_core.testing import detector_checks

CHECKS = detector_checks("setar", ratios=[0.0, 0.4], scorer="gl_mcm")


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conformance(check):
    check()
