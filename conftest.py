"""What holds for the tests of every package."""

import os

# Tests compare to the last digits, so they compute in one precision on every machine, and so do their child processes.
os.environ["OOD_DTYPE"] = "float32"
