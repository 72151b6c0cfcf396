"""Inference benchmark: decoding speed and memory with and without the key/value cache.

Both variants decode greedily, are compiled as one program, run once before timing, and generate the
same number of tokens from the same prompts. Without the cache, each token costs a forward pass over
the full fixed-length context.
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
from sheepop_jax.generation.decode import advance
from sheepop_jax.generation.engine import NO_END, generate, plan_texts, prefilled_batch
from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig, new_token_limit
from sheepop_jax.generation.sampling import most_probable
from sheepop_jax.model.transformer import Transformer, logits

MEMORY = (
    "peak memory: arguments + outputs + temporaries of the compiled program, as reported by XLA"
)


@dataclass(frozen=True)
class Row:
    """One measurement; times are medians over the repeats.

    Attributes:
        prompt_length: tokens per prompt.
        batch_size: prompts per batch.
        new_tokens: tokens generated per prompt.
        cached: whether the key/value cache was used.
        seconds: time for the batch, including prompt processing.
        first_token_seconds: time to the first new token, including prompt processing.
        tokens_per_second: batch_size · new_tokens / seconds.
        peak_bytes: peak memory of the compiled program, including parameters.
        agreement: fraction of tokens that are equal with and without the cache.
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


@dataclass(frozen=True)
class BenchmarkConfig:
    """Benchmark settings: every prompt length × batch size, with and without the cache.

    Attributes:
        prompt_lengths: tokens per prompt; prompts are random.
        batch_sizes: prompts per batch.
        new_tokens: tokens generated per prompt; end-of-text does not stop a row.
        repeats: timed runs, after one warmup run.
        context: maximum positions per row; None for `model.max_seq_len`.
        seed: seed of the prompts.
    """

    prompt_lengths: Sequence[int]
    batch_sizes: Sequence[int]
    new_tokens: int
    repeats: int = 3
    context: int | None = None
    seed: int = 0

    def check(self, context: int) -> None:
        """Validates the settings.

        Raises:
            InputError: a number is below 1, or a prompt and its new tokens exceed the context.
        """
        for name in ("prompt_lengths", "batch_sizes", "new_tokens", "repeats"):
            value = getattr(self, name)
            numbers = [value] if isinstance(value, int) else list(value)
            if not numbers or min(numbers) < 1:
                raise InputError(name, numbers, "integers of at least 1")
        for length in self.prompt_lengths:
            new_token_limit(length, self.new_tokens, context)


def benchmark(
    model: Transformer,
    params: Any,
    config: BenchmarkConfig,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measures decoding.

    Args:
        model: the model, with the `dtype` to measure.
        params: model parameters, fp32 or quantized.
        config: benchmark settings.
        report: called with one line of text after each measurement.

    Raises:
        InputError: the settings are invalid; see `BenchmarkConfig.check`.
    """
    context = model.config.max_seq_len if config.context is None else config.context
    config.check(context)
    new_tokens = config.new_tokens
    generator = np.random.default_rng(config.seed)
    params = jax.device_put(params)
    rows: list[Row] = []
    for length in config.prompt_lengths:
        for size in config.batch_sizes:
            prompts_BT = generator.integers(0, model.vocab_size, (size, length), np.int32)
            programs = {
                True: cached_program(model, params, prompts_BT, new_tokens, context),
                False: _uncached(model, params, prompts_BT, new_tokens),
            }
            measured = [
                (way, *_measure(program, config.repeats)) for way, program in programs.items()
            ]
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
    """A compiled program that generates tokens."""

    write: Callable[[bool], Any]  # stop after the first token? → tokens [B, ≥ N]
    new_tokens: int
    peak_bytes: int


def _measure(program: Program, repeats: int) -> tuple[float, float, int, np.ndarray]:
    """Returns median seconds to the first and to all tokens, peak bytes, and tokens [B, N]."""
    tokens = np.asarray(program.write(False))[:, : program.new_tokens]
    medians = []
    for first_only in (True, False):
        times = []
        jax.block_until_ready(program.write(first_only))
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(program.write(first_only))
            times.append(time.perf_counter() - begin)
        medians.append(statistics.median(times))
    return medians[0], medians[1], program.peak_bytes, tokens


def cached_program(
    model: Transformer, params: Any, prompts_BT: np.ndarray, new_tokens: int, context: int
) -> Program:
    """Greedy decoding of the prompts [B, T]; its peak is that of the decoding loop."""
    prompts = prompts_BT.tolist()

    def config(new_tokens: int) -> GenerationConfig:
        return GenerationConfig(SamplingConfig(temperature=0), new_tokens, context=context)

    def write(first_only: bool) -> np.ndarray:
        new = 1 if first_only else new_tokens
        written = generate(model, params, prompts, NO_END, config(new))
        return np.array([completion.tokens for completion in written])

    texts, program, slots = plan_texts(model, params, prompts, NO_END, config(new_tokens))
    batch = prefilled_batch(program, texts, (len(texts), len(texts)), slots)
    loop = advance.lower(*batch.arguments(new_tokens, None), **program.static).compile()
    return Program(write, new_tokens, _peak_bytes(loop))


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
    """Fills slots `length` to `end` of [B, T] by full forward passes; returns the new tokens."""

    def write(slot: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        # Slots from `slot` on are still empty; the causal mask hides them.
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
        hidden_BD = jax.lax.dynamic_index_in_dim(hidden_BTD, slot - 1, axis=1, keepdims=False)
        logits_BV = logits(model, params, hidden_BD)
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
