"""`python -m ood_setar` is the command `ood-setar`, for launchers that start modules, as `torchrun -m` does."""

import sys

from ood_setar.cli import main

if __name__ == "__main__":
    sys.exit(main())
