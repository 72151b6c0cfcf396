"""The feed-forward layer and its activation.

Alphabet: B batch, T time, D model width, F feed-forward width, M = B·T tokens.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.model.linear import INIT_STDDEV, linear, residual_stddev


class FeedForward(nn.Module):
    """Position-wise feed-forward layer: W₂ activation(W₁ x)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD):
        cfg = self.config
        b, t, d = x_BTD.shape
        up = linear(cfg, cfg.d_ff, ("embed", "mlp"), "up", self.dtype, INIT_STDDEV)
        down = linear(cfg, d, ("mlp", "embed"), "down", self.dtype, residual_stddev(cfg))
        act = activate if cfg.remat != "none" else _activate_again
        return down(act(up(x_BTD.reshape(b * t, d)), cfg.activation)).reshape(b, t, d)


def activate(x: jax.Array, activation: str) -> jax.Array:
    """GELU x Φ(x) (Hendrycks & Gimpel 2016), exact or with the tanh approximation, or ReLU.

    Raises:
        ValueError: unknown activation.
    """
    match activation:
        case "gelu":
            # erf instead of the erfc of jax.nn.gelu: a third of the time on a CPU, and more on
            # GPUs. In fp32, the cancellation in 1 + erf costs at most 1e-6, below zero.
            wide = x.astype(jnp.float32)
            return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)
    raise ValueError(f"unknown activation {activation!r}")


# The backward pass recomputes the derivative from the input: storing Φ(x) would cost another array
# of the same size and its memory traffic. Not used in a rematerialized block: the gradient of
# `down` would need the activation once more, and XLA's GPU backend delays these gradients to the
# end of the backward pass and keeps every block's residuals alive.
_activate_again = jax.checkpoint(activate, static_argnums=1)
