"""The log-probability of given tokens against float64 numpy over the whole vocabulary."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sheepop_jax import scoring
from sheepop_jax.errors import InputError
from sheepop_jax.model.linear import quantized
from sheepop_jax.model.transformer import (
    Transformer,
    boxed_shapes,
    logits,
    padded_vocab_size,
)
from sheepop_jax.scoring import continuation_log_likelihoods, score
from tests import reference

pytestmark = pytest.mark.usefixtures("fast_compile")
VOCAB = 101
CONTEXT = 13
LENGTHS = (2, 1, 14, 0, 7, 13, 11, 5)  # 14 tokens fill the context of 13


@pytest.fixture(scope="module")
def trained(make_config, random_params):
    model = Transformer(make_config({"model.logit_softcap": 3.0}).model, VOCAB)
    params = random_params(model)
    return model, {**params, "embedding": params["embedding"] * 0.3}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, VOCAB, length).tolist() for length in LENGTHS]


def log_probabilities(model: Transformer, params: Any, ids: list[int]) -> np.ndarray:
    """log p of every token of the vocabulary after each of `ids`, float64 [T, V]."""
    logits = reference.logits(params, model.config, np.array([ids]))[0, :, : model.vocab_size]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(scores: Any, text: list[int], p_TV: np.ndarray, top: int, rtol: float = 1e-5) -> None:
    """`p_TV`: log p of every token at each position but the first."""
    assert len(scores.logprobs) == len(scores.top) == len(text)
    if text:
        assert math.isnan(scores.logprobs[0]) and scores.top[0] == ()
    for token, p_V, found, best in zip(
        text[1:], p_TV, scores.logprobs[1:], scores.top[1:], strict=True
    ):
        assert found == pytest.approx(p_V[token], rel=rtol, abs=rtol)
        wanted = np.argsort(-p_V, kind="stable")[:top]
        assert [i for i, _ in best] == wanted.tolist()
        np.testing.assert_allclose([p for _, p in best], p_V[wanted], rtol=rtol, atol=rtol)
        assert dict(best).get(token, found) == found  # bitwise


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_scores_are_those_of_numpy_at_every_position(trained, texts, top):
    found = score(*trained, texts, top=top, context=CONTEXT, batch_size=3)
    for text, scores in zip(texts, found, strict=True):
        p_TV = log_probabilities(*trained, text[:-1]) if len(text) > 1 else np.zeros((0, VOCAB))
        check(scores, text, p_TV, top)


def test_logits_in_chunks_are_those_of_numpy(trained, texts, monkeypatch):
    """3 · 13 tokens in chunks of 7, the last of which is padded and which cross rows."""
    shapes = []

    def chunk_of_7(tokens, vocab):
        shapes.append((tokens, vocab))
        return 7

    monkeypatch.setattr(scoring, "chunk_length", chunk_of_7)
    jax.clear_caches()
    found = score(*trained, texts, top=5, context=CONTEXT, batch_size=3)
    jax.clear_caches()
    assert (39, padded_vocab_size(VOCAB)) in shapes
    for text, scores in zip(texts, found, strict=True):
        if len(text) > 1:
            check(scores, text, log_probabilities(*trained, text[:-1]), 5)


def test_full_logits_are_never_materialized(make_config):
    config = make_config({"model.max_seq_len": 2048, "model.num_layers": 1}).model
    model = Transformer(config, 65537)
    shapes = nn.meta.unbox(boxed_shapes(model))
    tokens = jax.ShapeDtypeStruct((2, 2048), np.int32)
    compiled = scoring._scores.lower(model, shapes, tokens, tokens, 20).compile()
    logits_bytes = 2 * 2048 * padded_vocab_size(65537) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 3


@pytest.mark.parametrize("length", [15, 27, 28, 40])
def test_long_texts_are_scored_in_windows(trained, length):
    """Each token once, in windows of 13 of which the last reaches back."""
    model, params = trained
    text = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    p_TV = np.zeros((0, VOCAB))
    for start in range(1, length, CONTEXT):
        stop = min(start + CONTEXT, length)
        window = text[max(0, stop - 1 - CONTEXT) : stop - 1]
        p_TV = np.concatenate([p_TV, log_probabilities(model, params, window)[start - stop :]])
    short = text[:3]
    found = score(model, params, [short, text], top=2, context=CONTEXT, batch_size=2)
    check(found[1], text, p_TV, 2)
    check(found[0], short, log_probabilities(model, params, short[:-1]), 2)


def test_a_row_does_not_depend_on_its_batch_or_padding(trained, texts):
    together = score(*trained, texts, top=3, context=CONTEXT, batch_size=len(texts))
    for i in (2, 4):
        text, scores = texts[i], together[i]
        unpadded = len(text) - 1
        (alone,) = score(*trained, [text], top=3, context=unpadded, batch_size=1)
        np.testing.assert_allclose(alone.logprobs, scores.logprobs, rtol=1e-5)
        assert [[i for i, _ in best] for best in alone.top] == [
            [i for i, _ in best] for best in scores.top
        ]


def test_of_equal_tokens_the_lower_id_is_first(trained):
    """Every token but the last has a twin with equal logits."""
    model, params = trained
    params = {**params, "embedding": params["embedding"].at[50:100].set(params["embedding"][:50])}
    text = np.random.default_rng(6).integers(0, VOCAB, CONTEXT + 1).tolist()
    (scores,) = score(model, params, [text], top=8, context=CONTEXT)
    check(scores, text, log_probabilities(model, params, text[:-1]), 8)
    twins = [best for best in scores.top[1:] if 100 not in dict(best)]
    assert twins
    for best in twins:
        assert [i + 50 for i, _ in best[::2]] == [i for i, _ in best[1::2]]
        assert [p for _, p in best[::2]] == [p for _, p in best[1::2]]


def test_top_is_at_most_the_vocabulary(make_config, random_params):
    """Of 7 tokens, and an output embedding of its own with 121 more rows, which never appear."""
    model = Transformer(make_config({"model.tie_embeddings": False}).model, 7)
    params = random_params(model)
    text = [3, 1, 4, 1, 5]
    (scores,) = score(model, params, [text], top=20)
    assert [sorted(i for i, _ in best) for best in scores.top[1:]] == [list(range(7))] * 4
    check(scores, text, log_probabilities(model, params, text[:-1]), 20)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_scores_are_of_the_models_own_logits(trained, texts, kind):
    model, params = trained
    if kind == "int8":
        params = quantized(params)
    else:
        model = dataclasses.replace(model, dtype=jnp.bfloat16)
    text = texts[2]

    @jax.jit
    def own_logits(params: Any, inputs_BT: Any) -> jax.Array:
        hidden_BTD, _ = model.apply({"params": params}, inputs_BT)
        return logits(model, params, hidden_BTD)

    p_TV = np.asarray(own_logits(params, np.array([text[:-1]])), np.float64)[0, :, :VOCAB]
    p_TV -= np.log(np.exp(p_TV).sum(-1, keepdims=True))
    (scores,) = score(model, params, [text], top=20, context=CONTEXT, batch_size=1)
    check(scores, text, p_TV, 20)
    exact = log_probabilities(*trained, text[:-1])
    assert np.abs(p_TV - exact).max() > 1e-4  # a computation of its own


def test_continuations_are_sums_of_scores(trained, texts):
    text = texts[2]
    (scores,) = score(*trained, [text], top=1, context=CONTEXT, batch_size=3)
    after_best = [*text[:6], scores.top[6][0][0]]
    pairs = [(text[:6], text[6:]), (text[:6], after_best[6:]), (text[:3], [])]
    found = continuation_log_likelihoods(*trained, pairs, context=CONTEXT, batch_size=3)
    assert found[0] == (pytest.approx(sum(scores.logprobs[6:]), rel=1e-6), False)
    assert found[1] == (pytest.approx(scores.top[6][0][1], rel=1e-6), True)
    assert found[2] == (0.0, True)


def test_few_programs_serve_all_requests(make_config, random_params, compilations):
    """One for each bucket of lengths, and for up to one candidate or up to 20."""
    model = Transformer(make_config({"model.num_layers": 1}).model, VOCAB)
    params = random_params(model)
    draw = np.random.default_rng(8)

    def programs(lengths, top):
        compilations.clear()
        asked = [draw.integers(0, VOCAB, length).tolist() for length in lengths]
        score(model, params, asked, top=top, batch_size=3)
        pairs = [(text[:1], text[1:]) for text in asked if len(text) <= 30]
        continuation_log_likelihoods(model, params, pairs, batch_size=3)
        return len(compilations)

    assert programs([2, 17, 9, 5], 1) == 1
    assert programs([3, 1, 12], 0) == 0
    assert programs([17, 11], 2) == 1
    assert programs([4], 20) == 0
    assert programs([18, 30], 20) == 2
    assert programs([20, 18], 20) == 0  # padded to 29, as the others
    assert programs([25, 19, 30, 2, 8, 77], 7) == 0


def test_what_cannot_be_scored_is_refused(trained):
    model, params = trained
    assert score(model, params, []) == []
    for texts, top, field, got in (
        ([[1]], 21, "top", 21),
        ([[1]], -1, "top", -1),
        ([[1, 2], [3, VOCAB]], 0, "text", [3, VOCAB]),
        ([[-1]], 0, "text", [-1, -1]),
    ):
        with pytest.raises(InputError) as error:
            score(model, params, texts, top=top)
        assert (error.value.field, error.value.got) == (field, got)
    broken = {**params, "embedding": params["embedding"].at[5].set(np.nan)}
    for top in (0, 2):
        with pytest.raises(InputError) as error:
            score(model, broken, [[1, 2, 3]], top=top, context=CONTEXT)
        assert (error.value.field, error.value.got) == ("parameters", "NaN logits")
