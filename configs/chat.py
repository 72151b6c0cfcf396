"""Fine-tuning on conversations: loss on the assistant's messages only.

    python train.py --config configs/chat.py --config.train.init_from=RUN \
        --config.data.path=conversations.jsonl

`RUN` is a run trained here or an imported model; its model section and tokenizer are used.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """For one GPU; with `train.init_from`, of the size of that run."""
    c = base.get_config()
    c.model.dropout = 0.0

    c.data.name = "HuggingFaceTB/smoltalk"
    c.data.subset = "everyday-conversations"
    c.data.format = "chat"
    c.data.packing = "whole"
    c.data.document_mask = True

    c.optimizer.learning_rate = 2e-5
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 20
    c.optimizer.final_lr_fraction = 0.0

    c.train.num_steps = 0
    c.train.num_epochs = 2
    c.train.grad_accum_steps = 4
    c.train.eval_every = 100
    c.train.sample_prompt = "Hi! What can you do?"

    c.checkpoint.save_every = 100
    return c
