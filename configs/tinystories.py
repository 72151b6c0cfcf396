"""A small model on TinyStories, short stories in simple language, from the Hugging Face Hub."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """10.2M parameters with a vocabulary of 8192: 4 layers, width 384. One document per story."""
    c = base.get_config()
    c.model.d_model = 384
    c.model.num_layers = 4
    c.model.num_heads = 6
    c.model.d_ff = 1536
    c.model.dropout = 0.0

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
