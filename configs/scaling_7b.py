"""7B parameters, for `python -m sheepop_jax plan` alone: docs/scaling.md. Never trained."""

from ml_collections import ConfigDict

from configs import scaling_1b3


def get_config() -> ConfigDict:
    """32 layers of 4096; otherwise as the 1.3B."""
    c = scaling_1b3.get_config()
    c.model.d_model = 4096
    c.model.num_layers = 32
    c.model.num_heads = 32
    c.model.d_ff = 16384
    return c
