"""Dropout with one random key per row: masks do not depend on batch, mesh or microbatch."""

import jax
import jax.numpy as jnp

# Dropout sites within a transformer block, folded into a row's key. Each causal block of queries
# uses its own site for attention weights, starting at ATTENTION_WEIGHTS.
ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, ATTENTION_WEIGHTS = range(3)
ADAPTERS = 2**31  # the site of the adapters' inputs: beyond the number of any block


def fold(keys_B: jax.Array | None, number: int) -> jax.Array | None:
    """Folds a number into each row's key; None stays None."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, site: int) -> jax.Array:
    """Zeroes elements of x [B, …] with probability `rate` and scales the rest by 1 / (1 - rate).

    A row's mask depends only on its key and the site, not on the batch or its sharding. Without
    keys, x is returned unchanged. Source: Srivastava et al. 2014.
    """
    if rate == 0 or keys_B is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))
    # In fp32: bf16 would round 1 - rate by up to 0.2% and bias the mean.
    scaled = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)
    return jnp.where(keep(fold(keys_B, site)), scaled, jnp.zeros((), x.dtype))
