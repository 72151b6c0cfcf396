"""GPT-2 124M: 12 layers, width 768, context 1024. For one GPU with at least 24 GB."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """123.6M parameters with a vocabulary of 50257; about 0.5M tokens per update."""
    c = base.get_config()
    c.model.d_model = 768
    c.model.num_layers = 12
    c.model.num_heads = 12
    c.model.d_ff = 3072
    c.model.max_seq_len = 1024
    c.model.dropout = 0.0

    c.data.seq_len = 1024

    c.optimizer.learning_rate = 6e-4
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.optimizer.warmup_steps = 700

    c.train.num_steps = 10_000
    c.train.batch_size = 32
    c.train.eval_batches = 50

    c.checkpoint.save_every = 1000
    c.train.eval_every = 1000
    return c
