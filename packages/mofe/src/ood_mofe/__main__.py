"""`python -m ood_mofe` is the command `ood-mofe`, for launchers that start modules, as `torchrun -m` does."""

import sys

from ood_mofe.cli import main

if __name__ == "__main__":
    sys.exit(main())
