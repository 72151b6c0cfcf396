"""Text generation: prefill the key/value cache with the prompts, then decode one token per step.

Alphabet: P prompts, B rows (P · samples, prompt-major), T prompt bucket, N bucket of new tokens,
D model width, V vocabulary (padded).

Lengths are rounded up to a few buckets and all other values are traced, so one compilation serves
many requests. A row's random key is folded from the seed, the prompt's tokens, the sample number
and the token's place in the text, so a sample does not depend on the batch or the padding.

A text longer than the context of C tokens is written with a sliding window: each time it reaches C
tokens, the cache is prefilled again with the last C // 2, whose positions restart at 0. A model
with a sliding window of its own and rotary positions needs no restart: it writes on, in a cache of
that size.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import GenerationConfig, Kind, SamplingConfig, new_token_limit
from sheepop_jax.generation.sampling import sample
from sheepop_jax.model.kv_cache import Cache, init_cache
from sheepop_jax.model.transformer import Transformer, logits

NO_END = -1  # end-of-text id that matches no token
SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
        tokens: new token ids, without the final end-of-text.
        stop_reason: "end_of_text", or "length" if the limit of new tokens was reached first.
    """

    tokens: list[int]
    stop_reason: Literal["end_of_text", "length"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """A batch of prompts and sampling settings as arrays, all of them traced.

    Attributes:
        prompts_PT: int32, left-padded.
        start_P: int32, slot of each prompt's first token.
        hash_P: uint32, CRC-32 of each prompt's tokens.
        sample_P: int32, number of each prompt's first sample.
        dropped_P: int32, tokens of each text before the window, which `prompts_PT` lacks.
        limit_P: int32 in [1, N], maximum new tokens.
        seed: uint32 scalar.
        end_of_text: int32 scalar.
        temperature: fp32 scalar; top_k: int32 scalar; top_p: fp32 scalar.
    """

    prompts_PT: Any
    start_P: Any
    hash_P: Any
    sample_P: Any
    dropped_P: Any
    limit_P: Any
    seed: Any
    end_of_text: Any
    temperature: Any
    top_k: Any
    top_p: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """The state of all rows between two decoding steps.

    Attributes:
        cache: keys and values of every token except the newest.
        key_B: random key of each row, before folding in the position. Constant.
        dropped_B: int32, tokens of each text before the window. Constant.
        limit_B: int32, maximum new tokens of each row. Constant.
        newest_B: int32, the last sampled token.
        tokens_BN: int32, the sampled tokens; undefined beyond a row's length.
        count: int32 scalar, tokens sampled per row, including finished rows.
        length_B: int32, number of valid tokens in each row.
        done_B: boolean, rows that have reached end-of-text or their limit.
    """

    cache: Cache
    key_B: jax.Array
    dropped_B: jax.Array
    limit_B: jax.Array
    newest_B: jax.Array
    tokens_BN: jax.Array
    count: jax.Array
    length_B: jax.Array
    done_B: jax.Array


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    end_of_text: int,
    config: GenerationConfig,
) -> list[Completion]:
    """Continues each prompt `config.num_samples` times.

    Args:
        model: the model; activations and cache use its `dtype`, and matrices are cast to it once.
        params: model parameters, fp32 or quantized.
        prompts: token ids; an empty prompt starts from end-of-text.
        end_of_text: token id that ends a row; `NO_END` for none.
        config: sampling settings, number of new tokens and of samples.

    Returns:
        P · num_samples completions, prompt-major.

    Raises:
        InputError: a prompt or its new tokens exceed the context, a token id is outside the
            vocabulary, or the model's logits are not finite.
    """
    context = model.config.max_seq_len if config.context is None else config.context
    max_new_tokens, num_samples = config.max_new_tokens, config.num_samples
    prompts = [list(ids) or [end_of_text] for ids in prompts]
    learned = model.config.position == "learned"
    limits = [
        new_token_limit(len(ids), max_new_tokens, context, slide=config.slide, learned=learned)
        for ids in prompts
    ]
    for ids in prompts:
        if not 0 <= min(ids) <= max(ids) < model.vocab_size:
            raise InputError(
                "prompt", [min(ids), max(ids)], f"token ids from 0 to {model.vocab_size - 1}"
            )
    if config.slide and model.config.sliding_window and model.config.position == "rope":
        longest = max((n + len(ids) for n, ids in zip(limits, prompts, strict=True)), default=0)
        context = max(context, longest)
    if not prompts or max_new_tokens == 0:
        return [Completion([], "length") for _ in range(len(prompts) * num_samples)]

    build = functools.partial(
        build_request,
        context=context,
        sampling=config.sampling,
        seed=config.seed,
        end_of_text=end_of_text,
    )
    rooms = [min(limit, context - len(ids)) for ids, limit in zip(prompts, limits, strict=True)]
    request, samples, new_tokens = build(prompts, rooms), num_samples, max(rooms)
    hash_B = np.repeat(request.hash_P, num_samples)
    sample_B = np.tile(np.arange(num_samples, dtype=np.int32), len(prompts))
    texts = [list(ids) for ids in prompts for _ in range(num_samples)]
    starts = [len(text) for text in texts]
    ends = starts + np.repeat(limits, num_samples)
    going = np.ones(len(texts), bool)  # neither ended nor at the limit of new tokens
    kept = context // 2
    while True:
        decoded = decode(
            params,
            jax.device_put(request),
            model=model,
            kind=config.sampling.kind,
            num_samples=samples,
            new_slots=bucket(new_tokens, context),
        )
        tokens_BN, length_B = map(np.asarray, decoded)
        for row in np.flatnonzero(going):
            texts[row] += tokens_BN[row, : length_B[row]].tolist()
            full = length_B[row] == request.limit_P[row // samples]
            going[row] = full and len(texts[row]) < ends[row]
        if max(map(max, texts)) >= model.vocab_size:
            raise InputError("parameters", "NaN logits", "finite logits", "another `step`")
        if not going.any():
            break
        # Slide the windows. Rows that are done write one token, which is dropped, so that the
        # shapes stay the same.
        length_B = np.array([len(text) for text in texts], np.int32)
        windows = [text[-kept:] if going[row] else [0] for row, text in enumerate(texts)]
        samples, new_tokens = 1, context - kept
        rooms = np.where(going, np.minimum(ends - length_B, new_tokens), 1).tolist()
        request = replace(
            build(windows, rooms),
            hash_P=hash_B,
            sample_P=sample_B,
            dropped_P=length_B - kept,
        )
    return [
        Completion(text[start:], "length" if len(text) == end else "end_of_text")
        for text, start, end in zip(texts, starts, ends, strict=True)
    ]


def bucket(length: int, context: int) -> int:
    """Rounds a length up to a power of two, at least 16 and at most the context."""
    power = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return max(length, min(power, context))


def build_request(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    context: int,
    sampling: SamplingConfig,
    seed: int,
    end_of_text: int,
) -> Request:
    """Builds a NumPy `Request` from nonempty prompts, left-padded to one bucket."""
    slots = bucket(max(map(len, prompts)), context)
    prompts_PT = np.zeros((len(prompts), slots), np.int32)
    for row, ids in zip(prompts_PT, prompts, strict=True):
        row[slots - len(ids) :] = ids
    return Request(
        prompts_PT=prompts_PT,
        start_P=np.array([slots - len(ids) for ids in prompts], np.int32),
        hash_P=np.array([zlib.crc32(np.array(ids, "<u4").tobytes()) for ids in prompts], np.uint32),
        sample_P=np.zeros(len(prompts), np.int32),
        dropped_P=np.zeros(len(prompts), np.int32),
        limit_P=np.array(limits, np.int32),
        seed=np.uint32(seed),
        end_of_text=np.int32(end_of_text),
        temperature=np.float32(sampling.fp32_temperature),
        top_k=np.int32(min(sampling.top_k, np.iinfo(np.int32).max)),
        top_p=np.float32(sampling.top_p),
    )


@functools.partial(jax.jit, static_argnames=("model", "kind", "num_samples", "new_slots"))
def decode(
    params: Any,
    request: Request,
    *,
    model: Transformer,
    kind: Kind,
    num_samples: int,
    new_slots: int,
) -> tuple[jax.Array, jax.Array]:
    """Generates completions in one compiled program: prefill, then a decoding loop.

    Recompiles only for a new model, kind, number of prompts or samples, or pair of buckets. Each
    prompt is prefilled once, independent of the number of samples.

    Returns:
        `SamplerState.tokens_BN` and `SamplerState.length_B`.
    """
    params = _cast_matrices(params, model.dtype)
    num_prompts, prompt_slots = request.prompts_PT.shape
    cache = init_cache(model.config, request.start_P, prompt_slots + new_slots, model.dtype)
    hidden_PTD, cache = _forward(model, params, request.prompts_PT, cache)

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, num_samples, axis=0) if num_samples > 1 else x

    rows = num_prompts * num_samples
    key_P = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(request.seed), request.hash_P)
    sample_B = jnp.tile(jnp.arange(num_samples, dtype=jnp.int32), num_prompts)
    sample_B += repeat(request.sample_P)
    state = SamplerState(
        cache=replace(
            cache,
            keys=tuple(map(repeat, cache.keys)),
            values=tuple(map(repeat, cache.values)),
            start=repeat(cache.start),
        ),
        key_B=jax.vmap(jax.random.fold_in)(repeat(key_P), sample_B),
        dropped_B=repeat(request.dropped_P),
        limit_B=repeat(request.limit_P),
        newest_B=jnp.zeros(rows, jnp.int32),
        tokens_BN=jnp.zeros((rows, new_slots), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        length_B=jnp.zeros(rows, jnp.int32),
        done_B=jnp.zeros(rows, bool),
    )
    state = _choose(model, kind, params, request, state, repeat(hidden_PTD[:, -1]))
    step = functools.partial(_sample_step, model, kind, params, request)
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.done_B), step, state)
    return state.tokens_BN, state.length_B


def _sample_step(
    model: Transformer, kind: Kind, params: Any, request: Request, state: SamplerState
) -> SamplerState:
    """Runs the model on each row's newest token and samples the next one. Pure."""
    hidden_B1D, cache = _forward(model, params, state.newest_B[:, None], state.cache)
    return _choose(model, kind, params, request, replace(state, cache=cache), hidden_B1D[:, 0])


def _choose(
    model: Transformer,
    kind: Kind,
    params: Any,
    request: Request,
    state: SamplerState,
    hidden_BD: jax.Array,
) -> SamplerState:
    """Samples each row's next token from its last hidden state and stores it."""
    logits_BV = logits(model, params, hidden_BD)
    position_B = state.dropped_B + state.cache.index - state.cache.start
    token_B = sample(
        jax.vmap(jax.random.fold_in)(state.key_B, position_B),
        logits_BV,
        request.temperature,
        request.top_k,
        request.top_p,
        kind=kind,
    )
    counts_B = ~state.done_B & (token_B != request.end_of_text)
    length_B = state.length_B + counts_B.astype(jnp.int32)
    return replace(
        state,
        newest_B=token_B,
        tokens_BN=jax.lax.dynamic_update_slice(
            state.tokens_BN, token_B[:, None], (jnp.zeros((), jnp.int32), state.count)
        ),
        count=state.count + 1,
        length_B=length_B,
        done_B=~counts_B | (length_B >= state.limit_B),
    )


def _forward(
    model: Transformer, params: Any, tokens_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Returns hidden states [B, T, D] of the next T slots and the updated cache."""
    outputs: Any = model.apply({"params": params}, tokens_BT, cache)
    return outputs


def _cast_matrices(params: Any, dtype: Any) -> Any:
    """Casts matrices to the compute dtype; int8 matrices and vectors are unchanged.

    Called outside the decoding loop; otherwise every step would read and cast the fp32 parameters.
    """
    return jax.tree.map(
        lambda p: p if p.ndim < 2 or p.dtype == jnp.int8 else p.astype(dtype), params
    )
