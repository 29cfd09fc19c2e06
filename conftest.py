"""What holds for the tests of every package."""

import os

import torch

# Tests compare to the last digits, so they compute in one precision on every machine, and so do their child processes.
os.environ["OOD_DTYPE"] = "float32"
# Without a GPU, kernels are interpreted. Triton decides this once, when first imported, and open_clip imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
