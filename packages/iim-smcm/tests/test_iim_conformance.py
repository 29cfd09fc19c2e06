"""The detectors of this package keep to what every detector keeps to."""

import pytest
from ood_core.testing import detector_checks

BRIEF = {"epochs": 2, "negative_prompts": 3, "context_length": 4, "batch_size": 12}
CHECKS = [*detector_checks("iim", **BRIEF), *detector_checks("s_mcm")]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conformance(check):
    check()
