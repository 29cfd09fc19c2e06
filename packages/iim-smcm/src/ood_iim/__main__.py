"""`python -m ood_iim` is the command `ood-iim`, for launchers that start modules, as `torchrun -m` does."""

import sys

from ood_iim.cli import main

if __name__ == "__main__":
    sys.exit(main())
