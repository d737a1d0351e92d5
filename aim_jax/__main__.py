"""Entry point of `python -m aim_jax PROGRAM ...`, equivalent to the command `aim-jax`."""

import sys

from aim_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
