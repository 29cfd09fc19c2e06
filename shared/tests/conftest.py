"""Small images, features and backbones that several test files use."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core.features import FeatureSet
from ood_core.testing.fixtures import image_folder, small_backbone

__all__ = ["image_folder", "small_backbone"]


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
