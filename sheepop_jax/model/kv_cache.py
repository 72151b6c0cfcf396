"""Static-shape key/value cache for decoding: a ring buffer, with one write per step for all rows.

Token number n of a row (padding included) is in slot n mod S. All rows share the number of the next
token, so rows may begin at any time: a row that joins is numbered backwards from there, and its
numbers may be negative. With a sliding window of W tokens the cache has at most W slots, and a new
token overwrites the one that has left the window.

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
        index: int32 scalar, the number of the next token to write, shared by all rows.
        start: int32 [B], the number of each row's first token that is no padding. A token's
            position is its number minus `start`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    index: Any  # a host that knows both passes NumPy
    start: Any

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
        if not window and length > 1:
            return (slots <= queries) & (slots >= self.start[:, None, None])
        # The newest token in the slots, and the number of the token that each slot holds.
        newest = self.index if length == 1 else self.index - 1
        keys = newest - (newest - slots) % slots.size
        if length > 1:
            keys = jnp.concatenate([keys, tokens])
        mask = (keys <= queries) & (keys >= self.start[:, None, None])
        return mask & (keys > queries - window) if window else mask


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
        window: the sliding window; 0 for none: T > 1 tokens then must fit before the buffer's end.

    Returns:
        The new buffer, and what the new tokens attend to, in the order of `Cache.mask`: the buffer,
        or, with a window and T > 1, its old content followed by all new tokens, of which the buffer
        may be too small to hold the first.
    """
    length, slots = rows_BTKC.shape[1], buffer_BSKC.shape[1]
    if length == 1 or not window:
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


def read_row(cache: Cache, row: jax.Array, length: int) -> Cache:
    """Copies one row to a cache of its own with `length` slots, its first token numbered 0."""
    start = cache.start[row]

    def read(buffer_BSKC: jax.Array) -> jax.Array:
        slots = buffer_BSKC.shape[1]
        row_1SKC = jax.lax.dynamic_slice_in_dim(buffer_BSKC, row, 1)
        row_1SKC = jnp.roll(row_1SKC, -start % slots, axis=1)
        return jnp.pad(row_1SKC, ((0, 0), (0, max(0, length - slots)), (0, 0), (0, 0)))

    return Cache(
        tuple(map(read, cache.keys)),
        tuple(map(read, cache.values)),
        cache.index - start,
        jnp.zeros(1, jnp.int32),
    )


def write_row(cache: Cache, row: jax.Array, new: Cache) -> Cache:
    """Replaces a row with the only row of `new`, numbered so that its next token is `cache.index`.

    Args:
        cache: S slots.
        row: int32 scalar.
        new: at least S slots, of which, without a window, only the first S are in use.
    """
    shift = cache.index - new.index
    zero = jnp.zeros((), jnp.int32)

    def write(buffer_BSKC: jax.Array, new_1SKC: jax.Array) -> jax.Array:
        slots = buffer_BSKC.shape[1]
        rolled_1SKC = jnp.roll(new_1SKC[:, :slots], shift % slots, axis=1)
        return jax.lax.dynamic_update_slice(buffer_BSKC, rolled_1SKC, (row, zero, zero, zero))

    return Cache(
        tuple(map(write, cache.keys, new.keys)),
        tuple(map(write, cache.values, new.values)),
        cache.index,
        cache.start.at[row].set(new.start[0] + shift),
    )
