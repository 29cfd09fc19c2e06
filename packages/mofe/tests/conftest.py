"""Settings of the tests of this package."""

import os

import torch

# Without a GPU, kernels are interpreted. Triton decides this once, when first imported, and open_clip imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
