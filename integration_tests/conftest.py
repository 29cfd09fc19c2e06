"""Settings of the tests across packages."""

import os

import pytest
import torch

# Without a GPU, kernels are interpreted. Triton decides this once, when first imported, and open_clip imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The sums of several threads differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
