"""The base model on WikiText-103, from the Hugging Face Hub."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """44.6M parameters; about 2.3 epochs."""
    c = base.get_config()
    c.data.name = "Salesforce/wikitext"
    c.data.subset = "wikitext-103-raw-v1"
    c.data.join_rows = True  # rows are the lines of articles, including blank lines
    c.data.val_split = "source"  # the official validation split, as in published results
    c.data.vocab_size = 32_000

    c.optimizer.learning_rate = 6e-4
    c.optimizer.weight_decay = 0.1
    c.optimizer.b2 = 0.95

    c.train.num_steps = 4000
    c.train.batch_size = 32
    c.train.grad_accum_steps = 4
    c.train.eval_batches = 100
    return c
