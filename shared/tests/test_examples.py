"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import ood_core
import pytest

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ood_core.__path__, "ood_core.")
    if not module.name.startswith("ood_core.cli")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
