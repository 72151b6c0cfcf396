"""A modern 124M model: RMSNorm, gated SiLU, QK-norm and grouped heads, as Qwen3.

`export --format hf` writes it as `Qwen3ForCausalLM`. For one GPU with at least 24 GB.
"""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    """124.7M parameters with a vocabulary of 50257; about 0.5M tokens per update."""
    c = gpt2_124m.get_config()
    c.model.num_kv_heads = 4
    c.model.head_dim = 64
    c.model.d_ff = 2432  # three matrices instead of two: as many weights as d_ff = 3648
    c.model.norm = "rmsnorm"
    c.model.norm_eps = 1e-6
    c.model.feed_forward = "gated"
    c.model.activation = "silu"
    c.model.qk_norm = True
    return c
