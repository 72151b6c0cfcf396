"""Static-shape key/value cache for decoding, with one write per step.

With a sliding window of W tokens the cache has at most W slots, and token number n of a row
(padding included) is in slot n mod S: it overwrites the one that has left the window.

Alphabet: B batch, T new tokens, S slots, K key/value heads, C head width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sheepop_jax.config.schema import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the decoded positions, in arrays of fixed shape.

    Attributes:
        keys: one [B, S, K, C] array per layer, with RoPE already applied.
        values: one [B, S, K, C] array per layer.
        index: int32 scalar, the number of the next token to write, shared by all rows; its slot
            without a window.
        start: int32 [B], the number of each row's first token that is no padding. A token's
            position is its number minus `start`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    index: jax.Array
    start: jax.Array

    def positions(self, length: int) -> jax.Array:
        """int32 positions [B, T] of the next T tokens; padding gets 0."""
        tokens = self.index + jnp.arange(length, dtype=jnp.int32)
        return jnp.maximum(tokens - self.start[:, None], 0)

    def mask(self, length: int, window: int) -> jax.Array:
        """Boolean: which keys of `extend` each of the next T tokens attends to.

        From its row's start to itself; with a window, at most the last `window` of those.

        Returns:
            [B, T, S], or [B, T, S + T] with a window and T > 1.
        """
        slots = jnp.arange(self.keys[0].shape[1], dtype=jnp.int32)
        tokens = self.index + jnp.arange(length, dtype=jnp.int32)
        queries = tokens[:, None]
        if not window:
            return (slots <= queries) & (slots >= self.start[:, None, None])
        # The newest token in the slots, and the number of the token that each slot holds.
        newest = self.index if length == 1 else self.index - 1
        keys = newest - (newest - slots) % slots.size
        if length > 1:
            keys = jnp.concatenate([keys, tokens])
        return (keys <= queries) & (keys > queries - window) & (keys >= self.start[:, None, None])


def init_cache(config: ModelConfig, start: jax.Array, length: int, dtype: Any) -> Cache:
    """Returns an empty cache for `length` tokens per row, padding included; `start` is int32 [B].

    It has S = `length` slots, or the sliding window if that is less.
    """
    slots = min(length, config.sliding_window or length)
    shape = (start.shape[0], slots, config.kv_heads, config.head_width)
    layers = [jnp.zeros(shape, dtype) for _ in range(2 * config.num_layers)]
    keys, values = tuple(layers[: config.num_layers]), tuple(layers[config.num_layers :])
    return Cache(keys, values, jnp.zeros((), jnp.int32), start.astype(jnp.int32))


def extend(
    buffer_BSKC: jax.Array, rows_BTKC: jax.Array, index: jax.Array, window: int
) -> tuple[jax.Array, jax.Array]:
    """Adds T new tokens to the keys or values of a layer.

    Args:
        buffer_BSKC: the keys or values so far.
        rows_BTKC: those of the new tokens.
        index: int32 scalar, number of the first new token.
        window: the sliding window; 0 for none.

    Returns:
        The new buffer, and what the new tokens attend to, in the order of `Cache.mask`: the buffer,
        or, with a window and T > 1, its old content followed by all new tokens, of which the buffer
        may be too small to hold the first.
    """
    if not window:
        buffer_BSKC = write_cache(buffer_BSKC, rows_BTKC, index)
        return buffer_BSKC, buffer_BSKC
    length, slots = rows_BTKC.shape[1], buffer_BSKC.shape[1]
    if length == 1:
        buffer_BSKC = write_cache(buffer_BSKC, rows_BTKC, index % slots)
        return buffer_BSKC, buffer_BSKC
    rows_BTKC = rows_BTKC.astype(buffer_BSKC.dtype)
    attended = jnp.concatenate([buffer_BSKC, rows_BTKC], axis=1)
    kept = min(length, slots)
    places = (index + jnp.arange(length - kept, length, dtype=jnp.int32)) % slots
    return buffer_BSKC.at[:, places].set(rows_BTKC[:, length - kept :]), attended


def write_cache(buffer_BSKC: jax.Array, rows_BTKC: jax.Array, index: jax.Array) -> jax.Array:
    """Writes T slots from `index` on in one update; casts them to the buffer's dtype."""
    zero = jnp.zeros((), index.dtype)
    return jax.lax.dynamic_update_slice(
        buffer_BSKC, rows_BTKC.astype(buffer_BSKC.dtype), (zero, index, zero, zero)
    )
