"""The embedded backbone: a small CLIP trained by this project, so that everything runs without a network.

It is an `open_clip.CLIP` whose patch embedding is a residual convolutional stem, so every code path is the
one that real CLIP models take. `tools/train_tiny.py` makes the weights and writes the model card.
"""

from ood_core.tiny.model import ResidualStem, TinyConfig, build_model, load_model
from ood_core.tiny.tokenizer import ByteTokenizer

__all__ = ["ByteTokenizer", "ResidualStem", "TinyConfig", "build_model", "load_model"]
