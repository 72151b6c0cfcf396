"""Train decoder-only language models from raw text, and write text with them, in JAX and Flax."""

__version__ = "0.1.0"
