"""Prompts → completions: one pass over the prompts fills the cache, then one token a step.

Alphabet: P prompts, B rows (P · samples, prompt-major), T prompt bucket, N bucket of new tokens,
D model width, V vocabulary (padded).

Lengths are rounded up to few buckets and everything else is traced, so one compile serves many
requests. A row's randomness is folded from the seed, its prompt's tokens, its sample number and the
position of the token, so neither the batch nor the padding changes a text.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sheepop_jax.errors import InputError
from sheepop_jax.generation.layout import Request, bucket, build_request
from sheepop_jax.generation.requests import Kind, SamplingConfig, new_token_limit
from sheepop_jax.generation.sampling import sample
from sheepop_jax.model.attention import Cache, init_cache
from sheepop_jax.model.transformer import Transformer, output_embedding, unembed

NO_END = -1  # an end-of-text that no token equals


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        tokens: the new ids, without the end-of-text that ended them.
        stop_reason: "length" when the limit of new tokens was reached first.
    """

    tokens: list[int]
    stop_reason: Literal["end_of_text", "length"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """A batch of rows between two steps.

    Attributes:
        cache: keys and values of every token but the newest.
        key_B: each row's key, before the position is folded in. Constant.
        limit_B: int32, each row's limit of new tokens. Constant.
        newest_B: int32, the token chosen last.
        tokens_BN: int32, the tokens chosen so far; beyond a row's length, anything.
        count: int32 scalar, tokens chosen so far in each row, the ended ones included.
        length_B: int32, how many of a row's tokens count.
        done_B: boolean, rows that have reached end-of-text or their limit.
    """

    cache: Cache
    key_B: jax.Array
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
    *,
    sampling: SamplingConfig,
    end_of_text: int,
    max_new_tokens: int | None = None,
    num_samples: int = 1,
    seed: int = 0,
    context: int | None = None,
) -> list[Completion]:
    """Continues each prompt `num_samples` times.

    Args:
        model: its `dtype` is that of the activations, the cache and, cast once, the matrices.
        params: the model's parameters, fp32 or quantised.
        prompts: token ids; an empty prompt starts from end-of-text.
        sampling: temperature, top-k, top-p.
        end_of_text: the id that ends a row; `NO_END` for none.
        max_new_tokens: for each row; None for what the row's context still holds, 256 at most.
        num_samples: continuations of each prompt.
        seed: in [0, 2**32).
        context: positions a row may fill; None for `model.config.max_seq_len`.

    Returns:
        P · num_samples completions, prompt-major.

    Raises:
        InputError: a prompt or its new tokens do not fit the context, a prompt's id is not in the
            vocabulary, or the model's logits are not finite.
    """
    context = model.config.max_seq_len if context is None else context
    prompts = [list(ids) or [end_of_text] for ids in prompts]
    limits = [new_token_limit(len(ids), max_new_tokens, context) for ids in prompts]
    for ids in prompts:
        if not 0 <= min(ids) <= max(ids) < model.vocab_size:
            raise InputError(
                "prompt", [min(ids), max(ids)], f"token ids from 0 to {model.vocab_size - 1}"
            )
    if not prompts or max_new_tokens == 0:
        return [Completion([], "length") for _ in range(len(prompts) * num_samples)]

    request = build_request(
        prompts, limits, context=context, sampling=sampling, seed=seed, end_of_text=end_of_text
    )
    decoded = decode(
        params,
        jax.device_put(request),
        model=model,
        kind=sampling.kind,
        num_samples=num_samples,
        new_slots=bucket(max(limits), context),
    )
    tokens_BN, length_B = map(np.asarray, decoded)
    completions = []
    for row, length in enumerate(length_B):
        tokens = tokens_BN[row, :length].tolist()
        if tokens and max(tokens) >= model.vocab_size:
            rule = "a model whose logits are finite"
            raise InputError("parameters", "logits that are not numbers", rule, "another --step")
        full = length == limits[row // num_samples]
        completions.append(Completion(tokens, "length" if full else "end_of_text"))
    return completions


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
    """The compiled whole: prompts in, `SamplerState.tokens_BN` and `.length_B` out.

    Compiles for each model, kind, number of prompts and of samples, and pair of buckets; for
    nothing else. Prompts are read once, whatever the number of samples.
    """
    params = _cast_matrices(params, model.dtype)
    cfg = model.config
    num_prompts, prompt_slots = request.prompts_PT.shape
    slots = prompt_slots + new_slots
    cache = init_cache(
        cfg.num_layers, request.start_P, slots, cfg.kv_heads, cfg.head_dim, model.dtype
    )
    hidden_PTD, cache = _forward(model, params, request.prompts_PT, cache)

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, num_samples, axis=0) if num_samples > 1 else x

    rows = num_prompts * num_samples
    key_P = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(request.seed), request.hash_P)
    sample_B = jnp.tile(jnp.arange(num_samples, dtype=jnp.int32), num_prompts)
    state = SamplerState(
        cache=replace(
            cache,
            keys=tuple(map(repeat, cache.keys)),
            values=tuple(map(repeat, cache.values)),
            start=repeat(cache.start),
        ),
        key_B=jax.vmap(jax.random.fold_in)(repeat(key_P), sample_B),
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
    """Feeds each row's newest token to the model and chooses the one after it. Pure."""
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
    """Draws each row's next token from its last hidden state and writes it down."""
    logits_BV = unembed(hidden_BD, output_embedding(params), model.vocab_size)
    position_B = state.cache.index - state.cache.start
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
    """Hidden states [B, T, D] of the next T slots, and the cache that holds them."""
    outputs: Any = model.apply({"params": params}, tokens_BT, cache)
    return outputs


def _cast_matrices(params: Any, dtype: Any) -> Any:
    """Matrices in the dtype they are multiplied in; int8 stays, and vectors are as in training.

    Outside the loop, or every step would read the fp32 parameters and cast them again.
    """
    return jax.tree.map(
        lambda p: p if p.ndim < 2 or p.dtype == jnp.int8 else p.astype(dtype), params
    )
