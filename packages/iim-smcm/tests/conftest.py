"""The released code's tiny CLIP in float64, as stored with the golden values, and a random one with images."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.backbones.transform import ImageTransform
from ood_core.testing.fixtures import image_folder, small_backbone
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

__all__ = ["image_folder", "small_backbone"]

GOLDEN = Path(__file__).parent / "golden"
CLIP = Path(__file__).parents[3] / "shared" / "tests" / "golden" / "clip.npz"


@pytest.fixture(scope="session")
def golden_losses():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "iim_losses.npz").items()}


@pytest.fixture(scope="session")
def golden_steps():
    return dict(np.load(GOLDEN / "iim_steps.npz"))


@pytest.fixture(scope="session")
def golden_clip():
    golden = np.load(CLIP)
    model = open_clip.CLIP(
        24,
        CLIPVisionCfg(layers=3, width=64, head_width=64, patch_size=8, image_size=32),
        CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=2, layers=2),
        quick_gelu=True,
    ).double()
    state = {key[3:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("sd/")}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        model.token_embedding.weight[golden["used_token_ids"]] = torch.from_numpy(golden["used_token_rows"])
    transform = ImageTransform(crop=(32, 32), resize=32)
    return OpenCLIPBackbone(model, open_clip.get_tokenizer("ViT-B-16"), transform, spec="golden")
