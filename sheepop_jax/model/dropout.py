"""Dropout by a random key for each row, so that no batch, mesh or microbatch changes a mask."""

import jax
import jax.numpy as jnp


def fold(keys_B: jax.Array | None, number: int) -> jax.Array | None:
    """Other keys for each row; none from none."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, site: int) -> jax.Array:
    """x [B, …] with components dropped at `rate` and the others scaled by 1 / (1 - rate).

    A row's mask is a function of its own key and the site, so that neither the batch nor its layout
    over devices changes it. Without keys nothing is dropped. Source: Srivastava et al. 2014.
    """
    if rate == 0 or keys_B is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))
    # In fp32: bf16 would round 1 - rate, by up to 0.2%, and with it the mean.
    scaled = (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype)
    return jnp.where(keep(fold(keys_B, site)), scaled, jnp.zeros((), x.dtype))
