"""A small random CLIP and a few images of four classes."""

import pytest
import torch
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import scenes
from ood_core.tiny import ByteTokenizer, TinyConfig, build_model


@pytest.fixture(scope="session")
def small_backbone():
    """A randomly initialised CLIP of the embedded architecture, a few kilobytes of weights."""
    torch.manual_seed(0)
    config = TinyConfig(
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
    transform = ImageTransform(crop=(32, 32), resize=32)
    return OpenCLIPBackbone(build_model(config), ByteTokenizer(), transform, spec="small")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Four classes of five 40-pixel images."""
    made = scenes.render(scenes.ID_CLASSES[:4], 5, size=40)
    return scenes.write_folder(made, tmp_path_factory.mktemp("images"))
