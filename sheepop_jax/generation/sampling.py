"""Sampling: penalties and biases, temperature, top-k, top-p, min-p, then one draw per row.

Alphabet: B batch, V vocabulary (padded rows at -inf), S tokens of the text, I biases, K reported
tokens. Timings below: one row, V = 50304, one process on 2 CPU cores, jax 0.12; 8 rows take about 8
times as long.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sheepop_jax.generation.requests import MAX_LOGIT_BIASES, MAX_LOGPROBS, Kind, SamplingConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The `SamplingConfig` of each row as arrays, all of them traced.

    Attributes:
        temperature_B, top_p_B, min_p_B: fp32; a temperature of 0 is greedy.
        top_k_B: int32.
        repetition_B, presence_B, frequency_B: fp32 penalties.
        biased_BI: int32 token ids; 2**31 - 1 is no token.
        bias_BI: fp32, added to their logits.
        level: int32 scalar of a batch that is sampled as needed: 0 if all rows are greedy, 1 if
            some are only scaled by their temperature, 2 if any needs more.
    """

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    repetition_B: Any
    presence_B: Any
    frequency_B: Any
    biased_BI: Any
    bias_BI: Any
    level: Any

    @classmethod
    def of(
        cls, configs: Sequence[SamplingConfig], kind: Kind, logprobs: bool = False
    ) -> "SamplingArrays":
        """NumPy arrays; `logprobs`: whether any row reports log-probabilities."""

        def column(name: str) -> np.ndarray:
            return np.array([getattr(config, name) for config in configs], np.float32)

        slots = MAX_LOGIT_BIASES if kind.adjusted else 0
        biased_BI = np.full((len(configs), slots), np.iinfo(np.int32).max, np.int32)
        bias_BI = np.zeros((len(configs), slots), np.float32)
        for row, config in enumerate(configs):
            for i, (token, bias) in enumerate(config.logit_bias):
                biased_BI[row, i], bias_BI[row, i] = token, bias
        kinds = [config.kind for config in configs]
        more = logprobs or any(k.top_k or k.top_p or k.min_p or k.adjusted for k in kinds)
        level = 2 if more else int(any(k.sampled for k in kinds))
        top_k = [min(config.top_k, np.iinfo(np.int32).max) for config in configs]
        return cls(
            temperature_B=np.array([c.fp32_temperature for c in configs], np.float32),
            top_k_B=np.array(top_k, np.int32),
            top_p_B=column("top_p"),
            min_p_B=column("min_p"),
            repetition_B=column("repetition_penalty"),
            presence_B=column("presence_penalty"),
            frequency_B=column("frequency_penalty"),
            biased_BI=biased_BI,
            bias_BI=bias_BI,
            level=np.int32(level),
        )


class Logprobs(NamedTuple):
    """Log-probabilities before any sampling setting, in nats.

    Attributes:
        chosen_B: fp32, of each row's token.
        tokens_BK: int32, the K most probable tokens, best first; lower ids first among ties.
        top_BK: fp32, theirs.
    """

    chosen_B: jax.Array
    tokens_BK: jax.Array
    top_BK: jax.Array


def choose(
    keys_B: jax.Array,
    logits_BV: jax.Array,
    arrays: SamplingArrays,
    counts: Any,
    kind: Kind,
) -> tuple[jax.Array, Logprobs | None]:
    """Samples one token per row, and reports log-probabilities if `kind.logprobs`.

    Args:
        keys_B: one random key per row; unused by greedy rows.
        logits_BV: fp32; -inf excludes a token.
        arrays: settings of each row.
        counts: a function that returns `seen_BV`, boolean, the tokens of the prompt and the text,
            and `written_BV`, int32, how often each was written in the text; used if
            `kind.adjusted`.
        kind: the operations to compile.

    Returns:
        int32 [B], V for a row with NaN logits; and the log-probabilities.
    """
    if not kind.as_needed:
        return _choose(keys_B, logits_BV, arrays, counts, kind)

    def branch(kind: Kind) -> Any:
        def run() -> tuple[jax.Array, Logprobs]:
            token_B, logprobs = _choose(keys_B, logits_BV, arrays, counts, kind)
            if logprobs is None:
                zeros_BK = jnp.zeros((logits_BV.shape[0], MAX_LOGPROBS))
                logprobs = Logprobs(zeros_BK[:, 0], zeros_BK.astype(jnp.int32), zeros_BK)
            return token_B, logprobs

        return run

    chosen: tuple[jax.Array, Logprobs] = jax.lax.switch(
        arrays.level, [branch(Kind()), branch(Kind(sampled=True)), branch(kind)]
    )
    return chosen


def _choose(
    keys_B: jax.Array, logits_BV: jax.Array, arrays: SamplingArrays, counts: Any, kind: Kind
) -> tuple[jax.Array, Logprobs | None]:
    adjusted_BV = adjust(logits_BV, arrays, *counts()) if kind.adjusted else logits_BV
    token_B = draw(keys_B, adjusted_BV, arrays, kind)
    return token_B, report(logits_BV, token_B) if kind.logprobs else None


def adjust(
    logits_BV: jax.Array, arrays: SamplingArrays, seen_BV: jax.Array, written_BV: jax.Array
) -> jax.Array:
    """Applies the penalties and biases to the logits.

    Sources: repetition penalty: Keskar et al. 2019, "CTRL", section 4.1, with negative logits
    multiplied as in transformers; presence and frequency penalty, logit bias: the OpenAI API.
    """
    penalty_B1 = arrays.repetition_B[:, None]
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, penalized_BV, logits_BV)
    logits_BV -= arrays.presence_B[:, None] * (written_BV > 0)
    logits_BV -= arrays.frequency_B[:, None] * written_BV
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, arrays.biased_BI].add(arrays.bias_BI, mode="drop")


def draw(keys_B: jax.Array, logits_BV: jax.Array, arrays: SamplingArrays, kind: Kind) -> jax.Array:
    """Draws one token per row, int32 [B]; the highest logit where the temperature is 0.

    A row with NaN logits gets V, which is not a token id.

    Source: the Gumbel-max trick: argmax(logits + G) with G = -log(-log U) is distributed as
    softmax(logits) (Maddison et al. 2014, "A* sampling", section 2).
    """
    if not kind.sampled:
        return most_probable(logits_BV)
    greedy_B1 = arrays.temperature_B[:, None] == 0
    scaled_BV = logits_BV / jnp.where(greedy_B1, 1, arrays.temperature_B[:, None])
    if kind.top_k:
        scaled_BV = keep_top_k(scaled_BV, arrays.top_k_B)
    if kind.top_p:
        scaled_BV = keep_top_p(scaled_BV, arrays.top_p_B)
    if kind.min_p:
        scaled_BV = keep_min_p(scaled_BV, arrays.min_p_B)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return most_probable(jnp.where(greedy_B1, logits_BV, scaled_BV + noise_BV))


def report(logits_BV: jax.Array, token_B: jax.Array) -> Logprobs:
    """Log-probabilities of the chosen and the `MAX_LOGPROBS` most probable tokens.

    All come from one array, so that those of the same token are equal.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV)
    chosen_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1, mode="clip")[:, 0]
    top_BK, tokens_BK = jax.lax.top_k(logprobs_BV, MAX_LOGPROBS)
    return Logprobs(chosen_B, tokens_BK, top_BK)


def most_probable(logits_BV: jax.Array) -> jax.Array:
    """The argmax, int32 [B]: the lowest id among ties, V for NaN logits.

    A maximum and a minimum take 0.06 ms on a CPU; `jnp.argmax` takes 0.25 ms.
    """
    vocab_size = logits_BV.shape[-1]
    tokens_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best_BV, tokens_BV, vocab_size), axis=-1)


def keep_top_k(logits_BV: jax.Array, k_B: jax.Array | int) -> jax.Array:
    """Keeps the k highest logits of each row and sets the others to -inf.

    Ties are kept in order of token id. `k_B` is int32, [B] or a scalar, and traced; 0 keeps all. On
    a CPU, bisection takes 0.25 ms, sorting 7.8 ms, and `lax.top_k` 0.06 ms but with a static k,
    which recompiles for each value.
    """
    k_B = jnp.broadcast_to(jnp.asarray(k_B, jnp.int32), logits_BV.shape[:1])
    best_BV = _best(logits_BV, jnp.ones(logits_BV.shape, jnp.int32), k_B)
    return jnp.where((k_B == 0)[:, None] | best_BV, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p_B: jax.Array | float) -> jax.Array:
    """Keeps the fewest highest logits whose total probability reaches p; sets the others to -inf.

    Keeps at least one token; ties are kept in order of token id. `p_B` is fp32, [B] or a scalar,
    and traced; 1 keeps all. Takes 0.3 ms on a CPU.

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.
    """
    p_B = jnp.broadcast_to(jnp.asarray(p_B, jnp.float32), logits_BV.shape[:1])
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    target_B = jnp.maximum(p_B * jnp.sum(weights_BV, axis=-1), jnp.finfo(jnp.float32).tiny)
    best_BV = _best(logits_BV, weights_BV, target_B)
    return jnp.where((p_B >= 1)[:, None] | best_BV, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, p_B: jax.Array | float) -> jax.Array:
    """Keeps the tokens at least p times as probable as the best one; sets the others to -inf.

    `p_B` is fp32, [B] or a scalar, and traced; 0 keeps all.

    Source: Nguyen et al. 2024, "Turning up the heat: min-p sampling", section 3.
    """
    p_B = jnp.broadcast_to(jnp.asarray(p_B, jnp.float32), logits_BV.shape[:1])
    lowest_B = jnp.max(logits_BV, axis=-1) + jnp.log(p_B)
    return jnp.where(logits_BV >= lowest_B[:, None], logits_BV, -jnp.inf)


def _best(logits_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Boolean [B, V]: the fewest highest logits whose weights sum to at least the target, or all.

    `weights_BV` and `target_B` are positive and share one dtype, int32 or fp32.
    """
    rank_BV = _rank(logits_BV)
    # A CPU computes the sums one after the other; on other devices the number of kernels dominates.
    threshold_B = jax.lax.platform_dependent(
        *(rank_BV, weights_BV, target_B),
        cpu=functools.partial(_threshold, 1),
        default=functools.partial(_threshold, 4),
    )
    above_BV = rank_BV > threshold_B[:, None]
    tied_BV = rank_BV == threshold_B[:, None]

    def weigh(chosen_BV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen_BV, weights_BV, 0), axis=-1)

    def first_of_tied() -> jax.Array:
        """The tied tokens needed to reach the target."""
        tied_weights_BV = jnp.where(tied_BV, weights_BV, 0)
        before_BV = jnp.cumsum(tied_weights_BV, axis=-1) - tied_weights_BV
        return tied_BV & (weigh(above_BV)[:, None] + before_BV < target_B[:, None])

    # Ties are rare, and resolving them costs as much as the threshold.
    several = jnp.any(jnp.sum(tied_BV, axis=-1) > 1)
    return above_BV | jax.lax.cond(several, first_of_tied, lambda: tied_BV)


def _threshold(
    bits: int, rank_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array
) -> jax.Array:
    """uint32 [B]: the highest threshold such that ranks >= threshold weigh at least the target.

    Finds `bits` bits per pass, from the highest: 32 / bits passes of 2^bits - 1 masked sums, which
    decrease as the threshold increases.
    """
    steps = jnp.arange(1, 1 << bits, dtype=jnp.uint32)

    def next_digit(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        shift = (32 - bits - bits * i).astype(jnp.uint32)
        raised_BS1 = (threshold_B[:, None] | (steps << shift))[:, :, None]
        chosen_BSV = rank_BV[:, None] >= raised_BS1
        sums_BS = jnp.sum(jnp.where(chosen_BSV, weights_BV[:, None], 0), axis=-1)
        digit_B = jnp.sum(sums_BS >= target_B[:, None], axis=-1, dtype=jnp.uint32)
        return threshold_B | (digit_B << shift)

    zero_B = jnp.zeros(target_B.shape, jnp.uint32)
    return jax.lax.fori_loop(0, 32 // bits, next_digit, zero_B, unroll=bits > 1)


def _rank(x: jax.Array) -> jax.Array:
    """Maps fp32 to uint32 in the same order: IEEE bits, inverted for negative numbers."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 equals 0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
