"""The inference benchmark: how fast and in how much memory a model decodes, with and without cache.

Both ways are greedy, compiled whole, warmed, and write the same number of tokens after the same
prompts. Without the cache, each token costs a forward pass over the whole fixed-length context.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import NO_END, decode
from sheepop_jax.generation.layout import bucket, build_request
from sheepop_jax.generation.requests import SamplingConfig, new_token_limit
from sheepop_jax.generation.sampling import most_probable
from sheepop_jax.model.transformer import Transformer, output_embedding, unembed

MEMORY = (
    "peak memory: arguments + outputs + temporaries of the compiled program, as XLA states them"
)


@dataclass(frozen=True)
class Row:
    """One measurement; times are medians over the repeats.

    Attributes:
        prompt_length: tokens of each prompt.
        batch_size: prompts at once.
        new_tokens: tokens written after each prompt.
        cached: whether keys and values were kept.
        seconds: for the whole batch, prompt included.
        first_token_seconds: the same for a single new token.
        tokens_per_second: batch_size · new_tokens / seconds.
        peak_bytes: of the compiled program, parameters included.
        agreement: share of the tokens that are the same with and without the cache.
    """

    prompt_length: int
    batch_size: int
    new_tokens: int
    cached: bool
    seconds: float
    first_token_seconds: float
    tokens_per_second: float
    peak_bytes: int
    agreement: float


def benchmark(
    model: Transformer,
    params: Any,
    *,
    prompt_lengths: Sequence[int],
    batch_sizes: Sequence[int],
    new_tokens: int,
    repeats: int = 3,
    context: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measures every prompt length × batch size, with the cache and without.

    Args:
        model: its `dtype` is the one measured.
        params: the model's parameters, fp32 or quantised.
        prompt_lengths: each is one set of random prompts.
        batch_sizes: prompts at once.
        new_tokens: exactly so many are written; no end-of-text stops a row.
        repeats: timed runs, after one that is not timed.
        context: None for `model.config.max_seq_len`.
        seed: of the prompts.
        report: called with a line after each measurement.

    Raises:
        InputError: a number is below 1, or a prompt and its new tokens do not fit the context.
    """
    context = model.config.max_seq_len if context is None else context
    for name, values in (
        ("--prompt_lengths", prompt_lengths),
        ("--batch_sizes", batch_sizes),
        ("--new_tokens", [new_tokens]),
        ("--repeats", [repeats]),
    ):
        if not values or min(values) < 1:
            raise InputError(name, list(values), "whole numbers of at least 1")
    for length in prompt_lengths:
        new_token_limit(length, new_tokens, context)

    generator = np.random.default_rng(seed)
    params = jax.device_put(params)
    rows: list[Row] = []
    for length in prompt_lengths:
        for size in batch_sizes:
            prompts_BT = generator.integers(0, model.vocab_size, (size, length), np.int32)
            programs = {
                True: cached_program(model, params, prompts_BT, new_tokens, context),
                False: _uncached(model, params, prompts_BT, new_tokens),
            }
            measured = [(way, *_measure(program, repeats)) for way, program in programs.items()]
            agreement = float(np.mean(measured[0][-1] == measured[1][-1]))
            for cached, first, seconds, peak_bytes, _ in measured:
                row = Row(
                    prompt_length=length,
                    batch_size=size,
                    new_tokens=new_tokens,
                    cached=cached,
                    seconds=seconds,
                    first_token_seconds=first,
                    tokens_per_second=size * new_tokens / seconds,
                    peak_bytes=peak_bytes,
                    agreement=agreement,
                )
                rows.append(row)
                report(
                    f"prompt {length}, batch {size}, {'with' if cached else 'without'} cache: "
                    f"{row.tokens_per_second:.1f} tokens/s"
                )
    return rows


@dataclass(frozen=True)
class Program:
    """A compiled program that writes tokens."""

    write: Callable[[bool], jax.Array]  # whether to stop after the first token → tokens [B, ≥ N]
    new_tokens: int
    peak_bytes: int


def _measure(program: Program, repeats: int) -> tuple[float, float, int, np.ndarray]:
    """Median seconds to the first token and to all, peak bytes, and the tokens [B, N]."""
    tokens = np.asarray(program.write(False))[:, : program.new_tokens]
    medians = []
    for first_only in (True, False):
        times = []
        program.write(first_only).block_until_ready()
        for _ in range(repeats):
            begin = time.perf_counter()
            program.write(first_only).block_until_ready()
            times.append(time.perf_counter() - begin)
        medians.append(statistics.median(times))
    return medians[0], medians[1], program.peak_bytes, tokens


def cached_program(
    model: Transformer, params: Any, prompts_BT: np.ndarray, new_tokens: int, context: int
) -> Program:
    """Greedy decoding as `decode` does it, compiled for these prompts [B, T]."""
    greedy = SamplingConfig(temperature=0)

    def request(limit: int) -> Any:
        built = build_request(
            prompts_BT.tolist(),
            [limit] * len(prompts_BT),
            context=context,
            sampling=greedy,
            seed=0,
            end_of_text=NO_END,
        )
        return jax.device_put(built)

    one, all_ = request(1), request(new_tokens)
    program = decode.lower(
        params,
        all_,
        model=model,
        kind=greedy.kind,
        num_samples=1,
        new_slots=bucket(new_tokens, context),
    ).compile()
    return Program(
        lambda first_only: program(params, one if first_only else all_)[0],
        new_tokens,
        _peak_bytes(program),
    )


def _uncached(model: Transformer, params: Any, prompts_BT: np.ndarray, new_tokens: int) -> Program:
    length = prompts_BT.shape[1]
    slots = np.pad(prompts_BT, ((0, 0), (0, new_tokens)))
    tokens_BT = jax.device_put(slots)
    one, all_ = jax.device_put(np.int32(length + 1)), jax.device_put(np.int32(length + new_tokens))
    program = (
        jax.jit(_decode_uncached, static_argnums=(0, 3))
        .lower(model, params, tokens_BT, length, all_)
        .compile()
    )
    return Program(
        lambda first_only: program(params, tokens_BT, one if first_only else all_),
        new_tokens,
        _peak_bytes(program),
    )


def _decode_uncached(
    model: Transformer, params: Any, tokens_BT: jax.Array, length: int, end: jax.Array
) -> jax.Array:
    """Writes slots `length` to `end` of [B, T] by full forward passes; returns the new ones."""

    def write(slot: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        # Slots from `slot` on are still empty: being the future, they are not seen.
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
        hidden_BD = jax.lax.dynamic_index_in_dim(hidden_BTD, slot - 1, axis=1, keepdims=False)
        logits_BV = unembed(hidden_BD, output_embedding(params), model.vocab_size)
        zero = jnp.zeros((), jnp.int32)
        token_B1 = most_probable(logits_BV)[:, None]
        return jax.lax.dynamic_update_slice(tokens_BT, token_B1, (zero, slot))

    return jax.lax.fori_loop(jnp.int32(length), end, write, tokens_BT)[:, length:]


def _peak_bytes(program: Any) -> int:
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
