"""What every detector and every backbone keeps to, for the tests of packages that add some.

`check_detector` and `check_backbone` run all checks. `detector_checks` and `backbone_checks` give them one by one, for
a test runner; none is needed here. A check that fails raises an `AssertionError` with a sentence:

    @pytest.mark.parametrize("check", detector_checks("nearest_mean"), ids=str)
    def test_conformance(check):
        check()

The images are generated and small; the default backbone is the embedded one, so nothing is fetched.
"""

from ood_core.testing.backbones import backbone_checks, check_backbone
from ood_core.testing.checks import Check
from ood_core.testing.detectors import check_detector, detector_checks

__all__ = ["Check", "backbone_checks", "check_backbone", "check_detector", "detector_checks"]
