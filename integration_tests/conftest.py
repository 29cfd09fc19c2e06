"""Settings of the tests across packages."""

import pytest
from ood_core.testing.fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture(autouse=True, scope="module")
def _alone(one_thread):
    """The sums of several threads differ in the last bits."""
