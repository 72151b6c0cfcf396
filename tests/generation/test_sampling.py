"""Sampling against brute force in numpy float64, and against the distribution it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sheepop_jax.errors import InputError
from sheepop_jax.generation import sampling
from sheepop_jax.generation.requests import ALL, MAX_LOGPROBS, Kind, SamplingConfig
from sheepop_jax.generation.sampling import SamplingArrays, keep_top_k, keep_top_p, most_probable

ROWS, VOCAB = 7, 113
DRAWS = 40_000

top_k, top_p, best = map(jax.jit, (keep_top_k, keep_top_p, most_probable))
draw_jit = jax.jit(sampling.draw, static_argnames="kind")


def random_logits(seed: int, *, ties: bool = False) -> np.ndarray:
    """fp32 [ROWS, VOCAB] with padding at -inf; with ties, few distinct values and both zeros."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=3, size=(ROWS, VOCAB)).astype(np.float32)
    if ties:
        logits = np.round(logits / 2) * 2
        logits[logits == 0] *= generator.choice([-1, 1], size=(logits == 0).sum())
    logits[:, -5:] = -np.inf
    return logits


def probabilities(logits: np.ndarray) -> np.ndarray:
    """softmax in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def by_rank(row: np.ndarray) -> list[int]:
    """Tokens by falling logit, equal ones in order of token."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def brute_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    kept = np.full_like(logits, -np.inf)
    for row, out in zip(logits, kept, strict=True):
        for token in by_rank(row)[:k]:
            out[token] = row[token]
    return kept


def brute_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    kept = np.full_like(logits, -np.inf)
    for row, probability, out in zip(logits, probabilities(logits), kept, strict=True):
        total = 0.0
        for token in by_rank(row):
            out[token] = row[token]
            total += probability[token]
            if total >= p:
                break
    return kept


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def draw(logits: np.ndarray, config: SamplingConfig, row_keys: jax.Array) -> np.ndarray:
    """`sampling.draw` by a configuration, [B]."""
    arrays = SamplingArrays.of([config] * len(logits), config.kind)
    return np.asarray(draw_jit(row_keys, logits, arrays, kind=config.kind))


@pytest.fixture(params=["cpu", "default"])
def compiled_for(request, monkeypatch):
    """A jit of a filter, with the branches of a CPU or those of everything else."""

    def branch(*arrays, **branches):
        return branches[request.param](*arrays)

    monkeypatch.setattr(jax.lax, "platform_dependent", branch)
    return lambda keep: jax.jit(lambda logits, x: keep(logits, x))  # a trace of its own


def test_top_k_is_brute_force(compiled_for) -> None:
    top_k = compiled_for(keep_top_k)
    for ties in (False, True):
        for seed, k in enumerate([1, 2, 17, VOCAB - 5, VOCAB, 10 * VOCAB]):
            logits = random_logits(seed, ties=ties)
            np.testing.assert_array_equal(top_k(logits, k), brute_top_k(logits, k))


def test_top_p_is_brute_force(compiled_for) -> None:
    top_p = compiled_for(keep_top_p)
    for ties in (False, True):
        for seed, p in enumerate([1e-6, 0.1, 0.5, 0.83, 0.999] * 2):
            logits = random_logits(seed, ties=ties)
            np.testing.assert_array_equal(top_p(logits, p), brute_top_p(logits, p))


def test_top_p_of_known_probabilities() -> None:
    """Written out: 0.5, 0.25, 0.125, 0.125; a set that reaches p exactly is enough."""
    logits = np.log2(np.array([[0.125, 0.5, 0.125, 0.25]], np.float32)) * np.float32(np.log(2))
    for p, kept in [(0.3, [1]), (0.49, [1]), (0.51, [1, 3]), (0.8, [0, 1, 3]), (0.9, [0, 1, 2, 3])]:
        assert np.flatnonzero(np.isfinite(top_p(logits, p))[0]).tolist() == kept
    equal = np.zeros((1, 8), np.float32)
    assert np.flatnonzero(np.isfinite(top_p(equal, 0.5))[0]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("p", [1e-45, 1e-38, 1e-30])
def test_tiny_p_keeps_one(p: float) -> None:
    logits = random_logits(0)
    kept = np.isfinite(top_p(logits, p))
    assert (kept.sum(-1) == 1).all()
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))


def test_off_keeps_all() -> None:
    """A tail too small for an fp32 sum to notice included."""
    logits = np.concatenate([random_logits(0), np.full((ROWS, 1), -60, np.float32)], 1)
    np.testing.assert_array_equal(top_k(logits, 0), logits)
    np.testing.assert_array_equal(top_p(logits, 1.0), logits)


def test_most_probable_is_argmax() -> None:
    """The first of equals, as numpy has it; a row that is NaN logits gets a token out of range."""
    for seed in range(5):
        logits = random_logits(seed, ties=True)
        np.testing.assert_array_equal(best(logits), logits.argmax(-1))
    assert best(jnp.full((1, VOCAB), jnp.nan))[0] == VOCAB


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-31, 1e-25])
def test_coldest_is_greedy(temperature: float) -> None:
    logits = random_logits(1)
    tokens = draw(logits, SamplingConfig(temperature), keys(ROWS))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_top_1_is_greedy_with_ties() -> None:
    logits = random_logits(2, ties=True)
    tokens = draw(logits, SamplingConfig(1.3, top_k=1), keys(ROWS))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1e300])
def test_padding_is_never_chosen(temperature: float) -> None:
    """Not even at a temperature that makes all else equal."""
    logits = np.repeat(random_logits(3)[:1], DRAWS, 0)
    logits[:, 20:] = -np.inf
    tokens = draw(logits, SamplingConfig(temperature), keys(DRAWS))
    assert tokens.max() < 20


def test_min_p_is_brute_force() -> None:
    """Every row with its own limit; the best token is always kept, and 0 keeps all."""
    logits = random_logits(8)
    limits = np.array([0, 1e-30, 0.01, 0.1, 0.5, 0.999, 1], np.float32)
    got = np.asarray(jax.jit(sampling.keep_min_p)(logits, limits))
    for row, limit, out in zip(logits, limits, got, strict=True):
        p = probabilities(row[None])[0]
        kept = p >= float(limit) * p.max() * (1 - 1e-6)
        assert np.array_equal(out, np.where(kept, row, -np.inf))


ADJUSTED = [
    SamplingConfig(0, repetition_penalty=1.7),
    SamplingConfig(0, repetition_penalty=0.6, presence_penalty=-1.5),
    SamplingConfig(0, frequency_penalty=0.9),
    SamplingConfig(0, presence_penalty=0.8, frequency_penalty=-0.3),
    SamplingConfig(0, logit_bias=((3, 5.0), (3, 1.0), (107, -100.0))),
    SamplingConfig(0, 0, 1, 0, 1.2, 0.3, 0.2, ((0, -2.5), (50, 2.5))),
    SamplingConfig(0),
]


def test_penalties_and_biases_are_brute_force() -> None:
    """Row by row and token by token in float64, from the definition; every row has its own."""
    logits = random_logits(9)
    chance = np.random.default_rng(10)
    texts = [chance.integers(0, 20, 9).tolist() for _ in ADJUSTED]
    prompt = 4
    seen, written = np.zeros((2, ROWS, VOCAB), np.int32)
    for row, tokens in enumerate(texts):
        for place, token in enumerate(tokens):
            seen[row, token] = 1
            written[row, token] += place >= prompt
    kind = Kind(adjusted=True)
    arrays = SamplingArrays.of(ADJUSTED, kind)
    got = jax.jit(sampling.adjust)(logits, arrays, seen > 0, written)
    for row, config in enumerate(ADJUSTED):
        for token in range(VOCAB):
            value = float(logits[row, token])
            if token in texts[row]:
                value *= config.repetition_penalty ** (-1 if value > 0 else 1)
            count = texts[row][prompt:].count(token)
            value -= config.presence_penalty * (count > 0) + config.frequency_penalty * count
            value += sum(bias for biased, bias in config.logit_bias if biased == token)
            np.testing.assert_allclose(got[row, token], value, rtol=1e-6, atol=1e-6)


def test_log_probabilities_are_brute_force() -> None:
    """Of the raw logits; those of the same token are the same bits; lower ids first in a tie."""
    logits = random_logits(11)
    logits[0, [5, 9]] = logits[0].max() + 1
    tokens = np.array([9, 0, 1, 2, 3, 4, 5], np.int32)
    got = jax.jit(sampling.report)(logits, tokens)
    with np.errstate(divide="ignore"):  # padding
        expected = np.log(probabilities(logits))
    rows = np.arange(ROWS)
    np.testing.assert_allclose(got.chosen_B, expected[rows, tokens], rtol=1e-5)
    for row in range(ROWS):
        assert got.tokens_BK[row].tolist() == by_rank(logits[row])[:MAX_LOGPROBS]
    np.testing.assert_allclose(got.top_BK, expected[rows[:, None], got.tokens_BK], rtol=1e-5)
    assert got.top_BK[0, 1] == got.chosen_B[0]


@functools.partial(jax.jit, static_argnames="kind")
def chosen(row_keys: jax.Array, logits: jax.Array, arrays: SamplingArrays, kind: Kind) -> jax.Array:
    def counts() -> tuple[jax.Array, jax.Array]:
        return logits > 1, (logits > 2).astype(jnp.int32)

    return sampling.choose(row_keys, logits, arrays, counts, kind)[0]


def test_as_needed_is_as_compiled() -> None:
    """A program with every operation chooses as one with only those that a row needs."""
    logits, row_keys = random_logits(12), keys(ROWS, 13)
    hot = [SamplingConfig(1.3), SamplingConfig(0.8, 9, 0.9), SamplingConfig(0), ADJUSTED[4]]
    mixed = [*hot, SamplingConfig(2, min_p=0.1), ADJUSTED[5], SamplingConfig(0)]
    alone = [
        chosen(row_keys, logits, SamplingArrays.of([c] * ROWS, c.kind), c.kind).tolist()
        for c in mixed
    ]
    together = chosen(row_keys, logits, SamplingArrays.of(mixed, ALL), ALL).tolist()
    assert together == [tokens[row] for row, tokens in enumerate(alone)]
    for row in (0, 2):  # without any row that needs more
        same = SamplingArrays.of([mixed[row]] * ROWS, ALL)
        assert same.level == (1 if row == 0 else 0)
        assert chosen(row_keys, logits, same, ALL).tolist() == alone[row]


def expected_distribution(row: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """float64: temperature first, then top-k, then top-p of what is left."""
    logits = row[None].astype(np.float64) / config.temperature
    if config.top_k:
        logits = brute_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = brute_top_p(logits, config.top_p)
    if config.min_p:
        weights = probabilities(logits)
        logits = np.where(weights >= config.min_p * weights.max(), logits, -np.inf)
    return probabilities(logits)[0]


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(0.6),
        SamplingConfig(2.0, top_k=11),
        SamplingConfig(2.5, top_p=0.7),
        SamplingConfig(2.5, top_k=9, top_p=0.6),
        SamplingConfig(2.5, min_p=0.2),
    ],
)
def test_frequencies(config: SamplingConfig) -> None:
    """Chi-square; the order of the filters shows in the last case, that of the temperature too."""
    count, row = DRAWS, random_logits(4)[0]
    tokens = draw(np.repeat(row[None], count, 0), config, keys(count, seed=5))
    expected = expected_distribution(row, config) * count
    observed = np.bincount(tokens, minlength=VOCAB)
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    seen = np.append(observed[common], observed[~common].sum())
    hoped = np.append(expected[common], expected[~common].sum())
    seen, hoped = seen[hoped > 0], hoped[hoped > 0]
    assert stats.chisquare(seen, hoped * count / hoped.sum()).pvalue > 1e-3


def test_rows_and_keys_are_their_own() -> None:
    """A row's token depends on its own key and logits only; another key gives another token."""
    logits = random_logits(6)
    config = SamplingConfig(3.0, top_k=50, top_p=0.9)
    together = draw(logits, config, keys(ROWS))
    # Each row among strangers, with its own key and logits.
    for i in range(ROWS):
        others, other_keys = random_logits(7 + i), keys(ROWS, seed=7 + i)
        others[i] = logits[i]
        assert draw(others, config, other_keys.at[i].set(keys(ROWS)[i]))[i] == together[i]
    many = [draw(np.repeat(logits[:1], ROWS, 0), config, keys(ROWS, seed)) for seed in range(7)]
    assert len(set(np.ravel(many).tolist())) > 5


def test_new_values_compile_nothing(compilations: list[str]) -> None:
    logits = random_logits(0)
    for config in (
        SamplingConfig(1.0, 5, 0.9),
        SamplingConfig(0.7, 50, 0.5),
        SamplingConfig(1e20, 2**40, 0.99),
    ):
        draw(logits, config, keys(ROWS))
        if config.top_k == 5:
            compilations.clear()
    assert compilations == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", float("nan")),
        ("presence_penalty", -101.0),
        ("frequency_penalty", 101.0),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError) as error:
        SamplingConfig(**{name: value})
    assert error.value.field == name
    assert error.value.got is value
