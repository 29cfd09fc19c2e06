"""Detectors by name: those of this package and those that installed packages add.

A package adds one with an entry point in the group `ood.detectors`: `name = "package.module:Class"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ood_core.registry import DETECTORS, SAVED_DETECTORS

if TYPE_CHECKING:
    from ood_core.backbones.base import Backbone
    from ood_core.detectors.base import Detector

__all__ = ["broken_detectors", "create_detector", "detector_class", "known_options", "list_detectors"]


def list_detectors() -> list[str]:
    """Names that `create_detector` takes, from all installed packages, sorted.

    Example:
        >>> "mcm" in list_detectors()
        True
    """
    return DETECTORS.names()


def broken_detectors() -> dict[str, str]:
    """Detectors whose package cannot be imported, with the error of each."""
    return DETECTORS.broken()


def detector_class(name: str) -> type[Detector]:
    """The class registered under a name.

    Raises:
        UsageError: an unknown name, or one whose package cannot be imported.
    """
    loaded: type[Detector] = (SAVED_DETECTORS if name in SAVED_DETECTORS.entries else DETECTORS).load(name)
    return loaded


def known_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some options that a detector has.

    Args:
        name: of `list_detectors()`.
        options: of any detectors.

    Example:
        >>> known_options("mcm", {"temperature": 2.0, "neighbours": 5})
        {'temperature': 2.0}
    """
    from ood_core.options import method_options

    return {option: options[option] for option in method_options(detector_class(name)) if option in options}


def create_detector(
    name: str,
    *,
    backbone: Backbone | str | None = None,
    class_names: Sequence[str] | None = None,
    template: str | Sequence[str] | None = None,
    **options: Any,
) -> Detector:
    """Make a detector.

    Args:
        name: of `list_detectors()`.
        backbone: a backbone or its spec; None for a detector that only sees features.
        class_names: the known classes; zero-shot detectors need them, others take them from the labels they fit on.
        template: prompt with "{}" for the class name, or several to average; None is the method's own.
        **options: the method's (see `get_params`).

    Returns:
        The detector, ready to score if it needs no training, else ready to `fit`.

    Raises:
        UsageError: an unknown name or option, or a backbone without what the detector needs.

    Example:
        >>> create_detector("mcm", backbone="tiny", class_names=["dog", "cat"]).needs
        frozenset({'image'})
    """
    detector = detector_class(name)(class_names=class_names, template=template, **options)
    if backbone is not None:
        detector.attach(backbone)
    return detector
