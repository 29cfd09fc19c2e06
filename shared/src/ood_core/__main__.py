"""`python -m ood_core` is the command `ood`, for launchers that start modules, as `torchrun -m` does."""

import sys

from ood_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
