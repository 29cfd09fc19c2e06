"""Fixtures of pytest that the tests of several packages import into their conftest.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import scenes
from ood_core.testing.checks import one_thread as single_thread
from ood_core.tiny import ByteTokenizer, TinyConfig, build_model

__all__ = ["image_folder", "one_thread", "small_backbone"]

_SMALL = TinyConfig(
    image_size=32,
    width=16,
    layers=2,
    heads=2,
    embed_dim=12,
    stem=(4, 8),
    text_width=16,
    text_layers=2,
    text_heads=2,
)


@pytest.fixture(scope="session")
def small_backbone() -> OpenCLIPBackbone:
    """A randomly initialised CLIP of the embedded architecture, a few kilobytes of weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build_model(_SMALL)
    transform = ImageTransform(crop=(32, 32), resize=32)
    return OpenCLIPBackbone(model, ByteTokenizer(), transform, spec="small")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of five 40-pixel images."""
    made = scenes.render(scenes.ID_CLASSES[:4], 5, size=40)
    return scenes.write_folder(made, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other on several; and sums of several differ in the last bits."""
    with single_thread():
        yield
