"""A small random CLIP and a few images of four classes."""

from ood_core.testing.fixtures import image_folder, small_backbone

__all__ = ["image_folder", "small_backbone"]
