"""`python -m sheepop_jax COMMAND`, equivalent to the console script `sheepop-jax COMMAND`."""

import sys

from sheepop_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
