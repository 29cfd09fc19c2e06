"""Names of a package that are imported when they are first used, so that importing the package itself stays light."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["imported_when_used"]


def imported_when_used(
    package: str, names: Mapping[str, str | None]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        names: public name -> module of the package that defines it; None for a module of that name itself.

    Example:
        >>> get, _ = imported_when_used("ood_core", {"evaluate": "evaluation", "metrics": None})
        >>> get("metrics").__name__
        'ood_core.metrics'
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{names[name] or name}")
        return getattr(module, name) if names[name] else module

    return get, lambda: sorted({*vars(sys.modules[package]), *names})
