"""The image transform: torchvision's pixels, any size and mode, however thin."""

import numpy as np
import pytest
import torch
from ood_core.backbones.transform import ImageTransform
from PIL import Image
from torchvision import transforms


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (100, 80), (37, 91), (500, 333), (64, 300), (1, 1), (3, 2)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_torchvisions(size, interpolation):
    ours = ImageTransform(
        crop=(48, 48), resize=56, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation=interpolation
    )
    theirs = transforms.Compose(
        [
            transforms.Resize(56, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(48),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        ]
    )
    image = picture(*size)
    result = ours(image)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, theirs(image), rtol=1e-5, atol=1e-5)


def test_thin_images_keep_their_middle():
    transform = ImageTransform(crop=(32, 32), resize=32)
    for width, height in ((10_000, 3), (3, 10_000), (60_000, 1)):
        assert transform(picture(width, height)).shape == (3, 32, 32)
    strip = np.zeros((4, 4000, 3), np.uint8)
    strip[:, 1990:2010] = 255  # only the middle is white
    white = transform(Image.fromarray(strip))
    assert torch.equal(white, transform(Image.new("RGB", (8, 8), "white")))


def test_both_sides_are_resized_without_a_crop():
    squash = ImageTransform(crop=(20, 30), resize=None)
    expected = squash(picture(90, 40).resize((30, 20), Image.Resampling.BICUBIC))
    assert torch.equal(squash(picture(90, 40)), expected)


def test_modes_are_brought_to_rgb():
    transform = ImageTransform(crop=(16, 16), resize=16)
    grey = picture(20, 20).convert("L")
    assert torch.equal(transform(grey), transform(grey.convert("RGB")))
    opaque = picture(20, 20).convert("RGBA")
    assert torch.equal(transform(opaque), transform(picture(20, 20)))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert (transform(deep) - transform(grey)).abs().max() < 0.03
