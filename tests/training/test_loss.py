"""The chunked cross-entropy against numpy float64, and what it must never hold in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sheepop_jax.model import loss

B, T, D, VOCAB, V = 3, 7, 11, 101, 128


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    hidden = draw.standard_normal((B, T, D)).astype(np.float32)
    embedding = draw.standard_normal((V, D)).astype(np.float32)
    targets = draw.integers(0, VOCAB, (B, T), dtype=np.int32)
    weights = draw.integers(0, 2, (B, T)).astype(np.float32)
    weights[1, 2] = 0.25  # weights are not only 0 and 1
    return hidden, embedding, targets, weights


def reference(hidden, embedding, targets, weights, softcap=0.0):
    """Loss, d hidden and d embedding from the formula, one token at a time, in float64."""
    hidden, embedding = hidden.astype(np.float64), embedding.astype(np.float64)
    total, d_hidden, d_embedding = 0.0, np.zeros_like(hidden), np.zeros_like(embedding)
    for b in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            logits = embedding[:VOCAB] @ hidden[b, t]
            slope = np.ones(VOCAB)
            if softcap:
                slope = 1 / np.cosh(logits / softcap) ** 2
                logits = softcap * np.tanh(logits / softcap)
            probabilities = np.exp(logits - logits.max())
            probabilities /= probabilities.sum()
            total -= weights[b, t] * np.log(probabilities[targets[b, t]])
            d_logits = probabilities.copy()
            d_logits[targets[b, t]] -= 1
            d_logits *= weights[b, t] * slope
            d_hidden[b, t] = d_logits @ embedding[:VOCAB]
            d_embedding[:VOCAB] += np.outer(d_logits, hidden[b, t])
    return total, d_hidden, d_embedding


value_and_gradients = jax.jit(
    jax.value_and_grad(loss.cross_entropy_sum, argnums=(0, 1)), static_argnums=(4, 5, 6)
)


@pytest.mark.parametrize(
    ("chunk", "softcap"), [(1, 0.0), (5, 0.0), (7, 0.0), (50, 0.0), (5, 2.5), (50, 0.7)]
)
def test_value_and_gradients_follow_the_formula_for_any_chunk(arrays, chunk, softcap):
    value, gradients = value_and_gradients(*arrays, VOCAB, softcap, chunk)
    expected, *expected_gradients = reference(*arrays, softcap)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def test_gradients_scale_with_what_follows(arrays):
    def halved(hidden, embedding):
        return 0.5 * loss.cross_entropy_sum(hidden, embedding, *arrays[2:], VOCAB, 0.0, 3)

    found = jax.jit(jax.grad(halved, argnums=(0, 1)))(*arrays[:2])
    _, *expected = reference(*arrays)
    for half, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(half, 0.5 * whole, rtol=2e-5, atol=2e-6)


def test_bf16_activations_give_the_embedding_a_gradient_in_fp32(arrays):
    hidden, embedding, targets, weights = arrays
    half, table = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, embedding))
    value, (d_hidden, d_embedding) = value_and_gradients(
        half, embedding, targets, weights, VOCAB, 0.0, T
    )
    expected = reference(np.asarray(half), np.asarray(table), targets, weights)
    assert float(value) == pytest.approx(expected[0], rel=1e-2)
    assert (d_hidden.dtype, d_embedding.dtype) == (jnp.bfloat16, jnp.float32)
    for found, wanted in zip((d_hidden, d_embedding), expected[1:], strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=2e-2, atol=2e-2)
    # Summed in fp32: a sum in bf16 would be a bf16 number.
    assert (d_embedding != d_embedding.astype(jnp.bfloat16)).any()


def test_the_sum_of_exponentials_in_one_pass():
    """What GPUs take: with padding, with numbers near fp32's ends, with one logit that counts."""
    logits = 10 * np.random.default_rng(0).standard_normal((6, 1000)).astype(np.float32)
    logits[:, 900:] = -np.inf
    logits[1] *= 100
    logits[2, 5], logits[3, :900], logits[4, 1:] = 3e38, -3e38, -np.inf
    in_one_pass, total = jax.jit(loss._partition_in_one_pass)(logits)
    found = in_one_pass + np.log(total)
    wide = logits.astype(np.float64)
    largest = wide.max(1)
    expected = largest + np.log(np.exp(wide - largest[:, None]).sum(1))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Which parts XLA joins is its own affair: two of padding alone are nothing more.
    padding = (jnp.float32(-jnp.inf), jnp.float32(1))
    joined = loss._join(loss._join(padding, padding), (jnp.float32(2), jnp.float32(3)))
    assert tuple(map(float, joined)) == (2, 3)


def test_evaluation_sums_are_the_same_loss_and_count_right_predictions(arrays):
    hidden, embedding, targets, weights = arrays
    best = (hidden @ embedding[:VOCAB].T).argmax(-1)
    targets[0] = best[0]
    evaluate = jax.jit(loss.evaluation_sums, static_argnums=(4, 5, 6))
    sums = evaluate(hidden, embedding, targets, weights, VOCAB, 2.5, 5)
    assert float(sums.loss) == pytest.approx(reference(*arrays, 2.5)[0], rel=1e-6)
    assert float(sums.weight) == weights.sum()
    assert float(sums.correct) == (weights * (best == targets)).sum()


def test_what_weighs_nothing_changes_nothing(arrays):
    hidden, embedding, targets, weights = arrays
    other = np.where(weights == 0, (targets + 1) % VOCAB, targets).astype(np.int32)
    first, _ = value_and_gradients(hidden, embedding, targets, weights, VOCAB, 0.0, 5)
    second, _ = value_and_gradients(hidden, embedding, other, weights, VOCAB, 0.0, 5)
    assert float(first) == float(second)


def test_no_array_of_all_logits_exists():
    time, vocab = 64, 1 << 12
    elements = 2 * time * vocab
    shapes = (
        jax.ShapeDtypeStruct((2, time, D), jnp.float32),
        jax.ShapeDtypeStruct((vocab, D), jnp.float32),
        jax.ShapeDtypeStruct((2, time), jnp.int32),
        jax.ShapeDtypeStruct((2, time), jnp.float32),
    )

    def temporary_bytes(chunk):
        gradient = jax.grad(loss.cross_entropy_sum, argnums=(0, 1))
        compiled = (
            jax.jit(gradient, static_argnums=(4, 5, 6)).lower(*shapes, vocab, 0.0, chunk).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2 * time) >= 4 * elements  # whole logits: the measure sees them
    assert temporary_bytes(4) < elements


@pytest.mark.parametrize("tokens", [1, 2048, 32 * 1024, 2 * 3 * 5 * 7 * 11, 3 * 997])
@pytest.mark.parametrize("vocab", [128, 50304])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_chunk_length_stays_within_its_bound_and_covers_all_tokens(tokens, vocab, platform):
    elements = loss.chunk_elements(platform)
    chunk = loss.chunk_length(tokens, vocab, elements)
    assert 1 <= chunk <= tokens
    assert chunk == 1 or chunk * vocab <= elements
    chunks = -(-tokens // chunk)
    assert chunks * chunk - tokens < chunks  # evened out: hardly any padding
    whole = tokens * vocab
    assert chunks == 1 if whole <= elements else chunks < 2 * (whole / elements + 1)
    if tokens % 1024 == 0:  # as batches are
        assert tokens % chunk == 0


def test_a_logit_that_no_memory_holds_is_never_needed():
    assert loss.chunk_length(5, 1 << 20, 1 << 10) == 1


def test_an_accelerator_makes_more_logits_at_a_time():
    assert loss.CHUNK_ELEMENTS == loss.chunk_elements("cpu")
    assert 8 * loss.chunk_elements("cpu") <= loss.chunk_elements("cuda")
    assert loss.chunk_elements("tpu") == loss.chunk_elements("cuda")
