"""70B parameters, for `python -m sheepop_jax plan` alone: docs/scaling.md. Never trained."""

from ml_collections import ConfigDict

from configs import scaling_1b3


def get_config() -> ConfigDict:
    """80 layers of 8192 with 8 key/value heads, split by tensor too."""
    c = scaling_1b3.get_config()
    c.model.d_model = 8192
    c.model.num_layers = 80
    c.model.num_heads = 64
    c.model.num_kv_heads = 8
    c.model.d_ff = 44032

    c.train.batch_size = 256

    c.mesh.fsdp = 32
    c.mesh.tensor = 8
    return c
