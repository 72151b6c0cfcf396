"""Model FLOPs per token, from the matmuls of the traced forward pass."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.model.kv_cache import init_cache
from sheepop_jax.model.lora import trained_shapes
from sheepop_jax.model.transformer import Transformer, boxed_shapes, logits, output_embedding
from sheepop_jax.planning.program import dot_flops


def flops_per_token(model: Transformer, time: int) -> float:
    """Returns the forward and backward FLOPs per token, without rematerialization.

    Equals 6 N + 12 L T D with N weights and L layers (Chowdhery et al. 2022, "PaLM", appendix B).
    The backward pass has two matmuls for each one of the forward pass, so the total is three times
    the forward FLOPs. The forward pass is that of a decoding step with a full key/value cache of T
    slots, or of the sliding window: causal masking saves nothing. Vectors (norm scales, biases)
    count 2 FLOPs per component; tables used only for lookup count 0.

    Of frozen parameters, below adapters, the backward pass computes no gradients, 2 FLOPs each; the
    adapters' weights count 6 each.

    Args:
        model: the model, with its vocabulary.
        time: T, the sequence length.
    """
    one, two = (_forward(model, layers, time) for layers in (1, 2))
    total = 3.0 * (one + (model.config.num_layers - 1) * (two - one))
    if model.lora is None:
        return total
    params = nn.meta.unbox(boxed_shapes(model))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    frozen = sum(leaf.size for path, leaf in leaves if leaf.ndim == 1 or path[-1].key == "kernel")
    adapters = sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(trained_shapes(model))))
    return total - 2.0 * (frozen + output_embedding(params).size) + 6.0 * adapters


def _forward(model: Transformer, layers: int, time: int) -> int:
    """FLOPs of one token's forward pass through `layers` blocks and the logits."""
    model = model.clone(config=replace(model.config, num_layers=layers), implementation="xla")
    params = nn.meta.unbox(boxed_shapes(model))

    def step(params: Any, tokens: jax.Array) -> jax.Array:
        cache = init_cache(model.config, jnp.zeros(1, jnp.int32), time, model.dtype)
        hidden, _ = model.apply({"params": params}, tokens, cache)
        return logits(model, params, hidden)

    jaxpr = jax.make_jaxpr(step)(params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    vectors = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 1)
    return dot_flops(jaxpr.jaxpr) + 2 * vectors
