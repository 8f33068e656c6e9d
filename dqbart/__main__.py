"""`python -m dqbart`, and `torchrun ... -m dqbart compress`."""

import sys

from dqbart.cli import main

if __name__ == "__main__":
    sys.exit(main())
