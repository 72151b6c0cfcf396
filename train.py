"""Train a language model: the program behind `python train.py`."""

import sys

from sheepop_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
