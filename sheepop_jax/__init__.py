"""Train decoder-only language models from raw text and generate text, in JAX and Flax."""

__version__ = "0.1.0"
