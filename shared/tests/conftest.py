"""Small images, features and backbones that several test files use."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

# Without a GPU, kernels are interpreted. Triton decides this once, when first imported, and open_clip imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.data import scenes
from ood_core.features import FeatureSet
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


@pytest.fixture
def clustered():
    """Features of three classes, 40 images each, tight around three directions; and 60 of another kind."""

    def make(seed=0, *, far=False):
        rng = np.random.default_rng(seed)
        centres = np.eye(3, 10)
        labels = np.repeat(np.arange(3), 40)
        x = centres[labels] + 0.15 * rng.normal(size=(120, 10))
        if far:
            x = np.eye(10)[rng.integers(3, 10, 120)] + 0.15 * rng.normal(size=(120, 10))
        image = F.normalize(torch.from_numpy(x).float(), dim=-1)
        local = F.normalize(image[:, None] + 0.2 * torch.from_numpy(rng.normal(size=(120, 8, 10))).float(), dim=-1)
        return FeatureSet(
            ids=[f"{'ood' if far else 'id'}-{seed}-{i:03d}" for i in range(120)],
            labels=torch.from_numpy(labels),
            label_names=["a", "b", "c"],
            image=image,
            local=local,
            fingerprint="clusters",
            backbone="none",
        )

    return make
