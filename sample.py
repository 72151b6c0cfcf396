"""Write text with a trained model: the program behind `python sample.py`."""

import sys

from sheepop_jax.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
