"""`python -m ood_hvl` is the command `ood-hvl`, for launchers that start modules, as `torchrun -m` does."""

import sys

from ood_hvl.cli import main

if __name__ == "__main__":
    sys.exit(main())
