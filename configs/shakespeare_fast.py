"""Reaches nanoGPT's CPU loss on Tiny Shakespeare, 1.8857, as fast as possible.

Model and batch are those of `shakespeare_char`. Most of the speed comes from Muon with a high
learning rate; the short warmup helps. BENCHMARKS.md has an ablation of every setting below. Set the
text with --config.data.path=FILE.
"""

from ml_collections import ConfigDict

from configs import shakespeare_char


def get_config() -> ConfigDict:
    """0.8M parameters, 320 steps."""
    c = shakespeare_char.get_config()
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 1.4e-2
    c.optimizer.b1 = 0.8  # for AdamW on the embedding and LayerNorm
    c.optimizer.b2 = 0.95
    c.optimizer.warmup_steps = 10
    c.optimizer.schedule = "linear"
    c.optimizer.final_lr_fraction = 0.0

    c.train.num_steps = 320
    c.train.eval_every = 0  # only at the end
    c.train.sample_tokens = 0
    c.checkpoint.save_every = 0
    return c
