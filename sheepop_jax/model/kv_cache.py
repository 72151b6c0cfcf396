"""Static-shape key/value cache for decoding, with one write per step.

Alphabet: B batch, T new slots, S all slots, K key/value heads, C head width.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the decoded positions, in arrays of fixed shape.

    Attributes:
        keys: one [B, S, K, C] array per layer, with RoPE already applied.
        values: one [B, S, K, C] array per layer.
        index: int32 scalar, the next slot to write, shared by all rows.
        start: int32 [B], the first non-padding slot of each row. A token's position is its slot
            minus `start`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    index: jax.Array
    start: jax.Array

    def positions(self, length: int) -> jax.Array:
        """int32 positions [B, T] of the next T slots; padding slots get 0."""
        slots = self.index + jnp.arange(length, dtype=jnp.int32)
        return jnp.maximum(slots - self.start[:, None], 0)

    def mask(self, length: int) -> jax.Array:
        """Boolean [B, T, S]: each of the next T slots attends from its row's start to itself."""
        queries = (self.index + jnp.arange(length, dtype=jnp.int32))[:, None]
        keys = jnp.arange(self.keys[0].shape[1], dtype=jnp.int32)
        return (keys <= queries) & (keys >= self.start[:, None, None])


def init_cache(
    num_layers: int, start: jax.Array, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """Returns an empty cache with S = `slots`; `start` is int32 [B]."""
    shape = (start.shape[0], slots, kv_heads, head_dim)
    layers = [jnp.zeros(shape, dtype) for _ in range(2 * num_layers)]
    keys, values = tuple(layers[:num_layers]), tuple(layers[num_layers:])
    return Cache(keys, values, jnp.zeros((), jnp.int32), start.astype(jnp.int32))


def write_cache(buffer_BSKC: jax.Array, rows_BTKC: jax.Array, index: jax.Array) -> jax.Array:
    """Writes T new slots at `index` in one update; casts them to the buffer's dtype."""
    zero = jnp.zeros((), index.dtype)
    return jax.lax.dynamic_update_slice(
        buffer_BSKC, rows_BTKC.astype(buffer_BSKC.dtype), (zero, index, zero, zero)
    )
