"""Character-level Shakespeare with nanoGPT's CPU settings: 4 layers, width 128, batch 12 x 64.

Set the text with --config.data.path=FILE; the last 10% is the validation split. Tiny Shakespeare:
https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """0.8M parameters, 2,000 steps."""
    c = base.get_config()
    c.model.d_model = 128
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.d_ff = 512
    c.model.max_seq_len = 64
    c.model.dropout = 0.0

    c.data.path = "tinyshakespeare.txt"
    c.data.tokenizer = "char"
    c.data.seq_len = 64
    c.data.val_split = "tail"

    c.optimizer.learning_rate = 3e-3
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.1
    c.optimizer.warmup_steps = 100
    c.optimizer.final_lr_fraction = 0.05

    c.train.num_steps = 2000
    c.train.batch_size = 12
    c.train.grad_accum_steps = 1
    c.train.log_every = 50
    return c
