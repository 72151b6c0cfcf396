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
    """Position-wise feed-forward layer, by `config.feed_forward`.

    mlp: W₂ activation(W₁ x) (Vaswani et al. 2017); gated: W₂ (activation(W₃ x) ⊙ W₁ x) (Shazeer
    2020; SwiGLU with silu). W₁ is named "up", W₂ "down" and W₃ "gate".
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD):
        cfg = self.config
        b, t, d = x_BTD.shape
        x_MD = x_BTD.reshape(b * t, d)

        def widen(name: str) -> jax.Array:
            return linear(cfg, cfg.d_ff, ("embed", "mlp"), name, self.dtype, INIT_STDDEV)(x_MD)

        again = cfg.remat == "none"
        if cfg.feed_forward == "gated":
            inner_MF = (_gate_again if again else gate)(widen("gate"), widen("up"), cfg.activation)
        else:
            inner_MF = (_activate_again if again else activate)(widen("up"), cfg.activation)
        down = linear(cfg, d, ("mlp", "embed"), "down", self.dtype, residual_stddev(cfg))
        return down(inner_MF).reshape(b, t, d)


def activate(x: jax.Array, activation: str) -> jax.Array:
    """GELU x Φ(x) (Hendrycks & Gimpel 2016), exact or with the tanh approximation, ReLU or its
    square (So et al. 2021), or SiLU x σ(x).

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
        case "relu2":
            return jnp.square(jax.nn.relu(x))
        case "silu":
            return jax.nn.silu(x)
    raise ValueError(f"unknown activation {activation!r}")


def gate(gate_MF: jax.Array, up_MF: jax.Array, activation: str) -> jax.Array:
    """activation(gate) ⊙ up."""
    return activate(gate_MF, activation) * up_MF


# The backward pass recomputes the derivative from the input: storing Φ(x) would cost another array
# of the same size and its memory traffic. Not used in a rematerialized block: the gradient of
# `down` would need the activation once more, and XLA's GPU backend delays these gradients to the
# end of the backward pass and keeps every block's residuals alive.
_activate_again = jax.checkpoint(activate, static_argnums=1)
_gate_again = jax.checkpoint(gate, static_argnums=2)
