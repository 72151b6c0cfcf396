"""Short stories in simple words, from the Hugging Face hub: a small model learns to tell some."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """4 layers of 384, 10.2M parameters at a vocabulary of 8192; a document is a story."""
    c = base.get_config()
    c.model.d_model = 384
    c.model.num_layers = 4
    c.model.num_heads = 6
    c.model.d_ff = 1536
    c.model.dropout = 0.0

    c.data.source = "hub"
    c.data.name = "roneneldan/TinyStories"
    c.data.val_split = "source"
    c.data.vocab_size = 8192

    c.optimizer.learning_rate = 1e-3
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1

    c.train.num_steps = 8000
    c.train.batch_size = 64
    c.train.grad_accum_steps = 2
    c.train.eval_batches = 50
    c.train.sample_prompt = "Once upon a time"
    return c
