"""A small model of Python source code; trains in about two minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """About 1M parameters, trained on Python's standard library."""
    c = base.get_config()
    c.model.d_model = 128
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.d_ff = 512
    c.model.max_seq_len = 128
    c.model.dropout = 0.0  # less than one epoch: no overfitting

    c.data.vocab_size = 2048
    c.data.seq_len = 128

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.final_lr_fraction = 0.0

    c.train.num_steps = 1200
    c.train.grad_accum_steps = 1
    c.train.log_every = 20
    c.train.eval_every = 400
    c.train.sample_prompt = "class Reader:"

    c.checkpoint.save_every = 400
    return c
