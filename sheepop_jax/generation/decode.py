"""The compiled parts of text generation: prefill the key/value cache, then decode token by token.

Alphabet: B rows, P prompts, T prompt slots, S cache slots, N new tokens, H tokens for
penalties, E end tokens, D model width, V vocabulary (padded), K reported tokens.

All functions are pure, and all values except shapes and the listed static arguments are traced. A
row's random key is folded from the seed, the prompt's hash, the sample number and the token's place
in the text, so a sample does not depend on the batch or on padding.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from sheepop_jax.generation.requests import MAX_LOGPROBS, Kind
from sheepop_jax.generation.sampling import Logprobs, SamplingArrays, choose
from sheepop_jax.model.kv_cache import Cache, init_cache, read_row, write_row
from sheepop_jax.model.transformer import Transformer, logits, padded_vocab_size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The texts between two calls of `advance`, as arrays.

    Attributes:
        newest_B: int32, the last token of each text, which is not in the cache yet.
        place_B: int32, tokens in each text so far, the prompt included.
        limit_B: int32, maximum new tokens of this call; 0 for an unused row.
        seed_B, hash_B: uint32, the seed and the CRC-32 of the prompt's tokens.
        sample_B: int32, sample number.
        ends_BE: int32, tokens that end a text; -1 is no token.
        text_BH: int32, the last tokens of each text, and room for those of this call; penalties
            count the last H - N. `Kind.adjusted` only, else H = 0.
        prompt_B, length_B: int32, how many of `text_BH` are the prompt's, and are filled.
        sampling: sampling settings.
    """

    newest_B: Any
    place_B: Any
    limit_B: Any
    seed_B: Any
    hash_B: Any
    sample_B: Any
    ends_BE: Any
    text_BH: Any
    prompt_B: Any
    length_B: Any
    sampling: SamplingArrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """The state of all rows between two decoding steps.

    Attributes:
        cache: keys and values of every token except the newest.
        newest_B: int32, the last sampled token.
        text_BH: see `Rows`.
        tokens_BN: int32, the sampled tokens; undefined beyond a row's end.
        logprobs: of the sampled tokens, with a second axis of N; None if not asked for.
        count: int32 scalar, steps so far.
        length_B: int32, sampled tokens of each row before its end.
        done_B: boolean, rows that have reached an end token or their limit.
    """

    cache: Cache
    newest_B: jax.Array
    text_BH: jax.Array
    tokens_BN: jax.Array
    logprobs: Logprobs | None
    count: jax.Array
    length_B: jax.Array
    done_B: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joining:
    """A text that joins a batch.

    Attributes:
        cache: its cache of one row, with at least the slots of the batch's cache.
        row: int32 scalar, its row in the batch.
        count: int32 scalar, 1, or 0 if none joins.
    """

    cache: Cache
    row: Any
    count: Any


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    params: Any, tokens_PT: Any, start_P: Any, source_B: Any, *, model: Transformer, slots: int
) -> Cache:
    """Returns a cache of `slots` slots with the prompts' keys and values, repeated to B rows.

    Args:
        params: parameters, matrices in the model's dtype.
        tokens_PT: int32, prompts, left-padded.
        start_P: int32, slot of each prompt's first token.
        source_B: int32, the prompt of each row; None for one row for each prompt.
        model: the model.
        slots: S, at least T.
    """
    cache = init_cache(model.config, jnp.asarray(start_P), slots, model.dtype)
    if tokens_PT.shape[1]:
        _, cache = forward(model, params, jnp.asarray(tokens_PT), cache)
    if source_B is None:
        return cache
    repeated: Cache = jax.tree.map(lambda x: x[source_B] if x.ndim else x, cache)
    return repeated


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def prefill_chunk(params: Any, tokens_1T: Any, cache: Cache, *, model: Transformer) -> Cache:
    """Adds T tokens of a prompt to the cache of its row."""
    _, cache = forward(model, params, jnp.asarray(tokens_1T), cache)
    return cache


@functools.partial(jax.jit, static_argnames=("model", "kind", "size"), donate_argnames=("cache",))
def advance(
    params: Any,
    cache: Cache,
    rows: Rows,
    steps: Any,
    joining: Joining | None,
    *,
    model: Transformer,
    kind: Kind,
    size: int,
) -> SamplerState:
    """Writes up to `steps` tokens to each row, until all rows are done.

    Args:
        params: parameters, matrices in the model's dtype.
        cache: keys and values; overwritten.
        rows: the texts.
        steps: int32 scalar, at most `size`.
        joining: a text to add to the batch first; None if none ever joins this batch.
        model: the model.
        kind: sampling operations to compile.
        size: N.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    if joining is not None:
        new, row = joining.cache, joining.row
        cache = jax.lax.fori_loop(
            0, joining.count, lambda _, cache: write_row(cache, row, new), _traced(cache)
        )
    state = SamplerState(
        cache=_traced(cache),
        newest_B=rows.newest_B,
        text_BH=rows.text_BH,
        tokens_BN=jnp.zeros((rows.newest_B.size, size), jnp.int32),
        logprobs=_no_logprobs(rows.newest_B.size, size) if kind.logprobs else None,
        count=jnp.zeros((), jnp.int32),
        length_B=jnp.zeros_like(rows.newest_B),
        done_B=rows.limit_B == 0,
    )
    key_B = jax.vmap(_row_key)(rows.seed_B, rows.hash_B, rows.sample_B)
    return jax.lax.while_loop(
        lambda state: (state.count < steps) & ~jnp.all(state.done_B),
        functools.partial(sample_step, model, kind, params, rows, key_B),
        state,
    )


@functools.partial(jax.jit, static_argnames=("slots",))
def take_row(cache: Cache, row: Any, *, slots: int) -> Cache:
    """Copies a row to a cache of its own, for `Joining`."""
    return read_row(_traced(cache), row, slots)


@functools.partial(jax.jit, static_argnames=("dtype",))
def cast_matrices(params: Any, dtype: Any) -> Any:
    """Casts matrices to the compute dtype; int8 matrices and vectors are unchanged.

    Done once: otherwise every step would read and cast the fp32 parameters.
    """
    return jax.tree.map(
        lambda p: p if p.ndim < 2 or p.dtype == jnp.int8 else p.astype(dtype), params
    )


def sample_step(
    model: Transformer, kind: Kind, params: Any, rows: Rows, key_B: jax.Array, state: SamplerState
) -> SamplerState:
    """Runs the model on each row's newest token and samples the next one. Pure."""
    hidden_B1D, cache = forward(model, params, state.newest_B[:, None], state.cache)
    token_B, logprobs = choose(
        jax.vmap(jax.random.fold_in)(key_B, rows.place_B + state.count),
        logits(model, params, hidden_B1D[:, 0]),
        rows.sampling,
        functools.partial(_counts, model, rows, state),
        kind,
    )
    ended_B = jnp.any(token_B[:, None] == rows.ends_BE, axis=1)
    counts_B = ~state.done_B & ~ended_B
    length_B = state.length_B + counts_B.astype(jnp.int32)

    def put(column_B: jax.Array, table_BN: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            table_BN, jnp.expand_dims(column_B, 1), state.count, axis=1
        )

    slots_H = jnp.arange(state.text_BH.shape[1], dtype=jnp.int32)
    filled_B1 = (rows.length_B + state.count)[:, None]
    return SamplerState(
        cache=cache,
        newest_B=token_B,
        text_BH=jnp.where(slots_H == filled_B1, token_B[:, None], state.text_BH),
        tokens_BN=put(token_B, state.tokens_BN),
        logprobs=jax.tree.map(put, logprobs, state.logprobs),
        count=state.count + 1,
        length_B=length_B,
        done_B=state.done_B | ended_B | (length_B >= rows.limit_B),
    )


def forward(
    model: Transformer, params: Any, tokens_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Returns hidden states [B, T, D] of the next T tokens and the updated cache."""
    outputs: Any = model.apply({"params": params}, tokens_BT, cache)
    return outputs


def _row_key(seed: jax.Array, hash_: jax.Array, sample: jax.Array) -> jax.Array:
    """The random key of a row, before folding in the place."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), hash_), sample)


def _counts(model: Transformer, rows: Rows, state: SamplerState) -> tuple[jax.Array, jax.Array]:
    """Which tokens are in the text, boolean [B, V], and how often each was written, int32."""
    batch, size = state.text_BH.shape
    places_H = jnp.arange(size, dtype=jnp.int32)
    length_B1 = (rows.length_B + state.count)[:, None]
    counted = size - state.tokens_BN.shape[1]  # whatever the number of tokens per call
    filled_BH = (places_H < length_B1) & (places_H >= length_B1 - counted)
    written_BH = filled_BH & (places_H >= rows.prompt_B[:, None])
    rows_B1 = jnp.arange(batch)[:, None]
    zeros_BV = jnp.zeros((batch, padded_vocab_size(model.vocab_size)), jnp.int32)
    text_BH = state.text_BH
    seen_BV = zeros_BV.at[rows_B1, text_BH].add(filled_BH.astype(jnp.int32), mode="drop") > 0
    return seen_BV, zeros_BV.at[rows_B1, text_BH].add(written_BH.astype(jnp.int32), mode="drop")


def _no_logprobs(rows: int, size: int) -> Logprobs:
    zeros_BNK = jnp.zeros((rows, size, MAX_LOGPROBS))
    return Logprobs(zeros_BNK[..., 0], zeros_BNK.astype(jnp.int32), zeros_BNK)


def _traced(cache: Cache) -> Cache:
    """The cache with its numbers as jax arrays: the host passes NumPy."""
    return replace(cache, index=jnp.asarray(cache.index), start=jnp.asarray(cache.start))
