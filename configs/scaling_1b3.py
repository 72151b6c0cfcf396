"""1.3B parameters, for `python -m sheepop_jax plan` alone: docs/scaling.md. Never trained."""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    """24 layers of 2048, windows of 2,048 tokens, one microbatch of 64 windows, remat."""
    c = gpt2_124m.get_config()
    c.model.d_model = 2048
    c.model.num_layers = 24
    c.model.num_heads = 16
    c.model.d_ff = 8192
    c.model.max_seq_len = 2048
    c.model.remat = "full"

    c.data.seq_len = 2048

    c.train.batch_size = 64
    c.train.grad_accum_steps = 1

    c.mesh.fsdp = 8
    return c
