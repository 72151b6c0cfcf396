"""Decoding against full forward passes, and the laws that a text must obey."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sheepop_jax.errors import InputError
from sheepop_jax.generation.decode import NO_END, Completion, decode, generate
from sheepop_jax.generation.layout import bucket, build_request
from sheepop_jax.generation.request import (
    SamplingConfig,
    new_token_limit,
    resolve_context,
    truncate_left,
)
from sheepop_jax.model.transformer import Transformer, output_embedding, unembed

VOCAB = 307
GREEDY = SamplingConfig(0.0)
HOT = SamplingConfig(1.7, top_k=90, top_p=0.98)
PROMPTS = [[3, 41, 7], [5], [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31], [41, 3, 7]]

Build = Callable[..., tuple[Transformer, Any]]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


@functools.partial(jax.jit, static_argnums=0)
def logits_at(model: Transformer, params: Any, tokens_BT: jax.Array, last: jax.Array) -> jax.Array:
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
    return unembed(hidden_BTD[0, last], output_embedding(params), model.vocab_size)


def uncached(
    model: Transformer, params: Any, prompt: list[int], count: int, slots: int
) -> list[int]:
    """Greedy by a full forward pass over the whole text for each token, without cache or loop.

    Slots after the last token hold nothing, and come after it: it does not see them.
    """
    tokens = np.zeros((1, slots), np.int32)
    tokens[0, : len(prompt)] = prompt
    for last in range(len(prompt) - 1, len(prompt) - 1 + count):
        tokens[0, last + 1] = np.asarray(logits_at(model, params, tokens, last)).argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.position": "rope"},
        {"model.position": "sinusoidal", "model.num_kv_heads": 1},
        {"model.position": "learned", "model.num_kv_heads": 0, "model.use_bias": True},
        {"model.position": "rope", "model.num_kv_heads": 2, "model.tie_embeddings": False},
    ],
)
def test_cached_is_uncached(build: Build, overrides: dict[str, Any]) -> None:
    """Prompts of different lengths in one batch, token by token, to the end of the context."""
    model, params = build(overrides)
    got = generate(model, params, PROMPTS, sampling=GREEDY, end_of_text=NO_END, max_new_tokens=18)
    for prompt, completion in zip(PROMPTS, got, strict=True):
        assert completion.tokens == uncached(model, params, prompt, 18, slots=29)
        assert completion.stop_reason == "length"
    assert len(set().union(*tokens_of(got))) > 12  # texts that hang prove little


def test_beyond_the_trained_length(build: Build) -> None:
    """RoPE's positions are computed, so that the context can be raised."""
    model, params = build()
    got = generate(
        model,
        params,
        PROMPTS[:2],
        sampling=GREEDY,
        end_of_text=NO_END,
        context=53,
        max_new_tokens=50,
    )
    for prompt, completion in zip(PROMPTS, got, strict=False):
        assert completion.tokens == uncached(model, params, prompt, 50, slots=53)


def test_neither_batch_nor_padding_changes_a_text(build: Build) -> None:
    """Alone, in any order, beside longer prompts (another bucket), and with more samples."""
    model, params = build()

    def texts(prompts: list[list[int]], num_samples: int = 2, count: int = 9) -> list[list[int]]:
        return tokens_of(
            generate(
                model,
                params,
                prompts,
                sampling=HOT,
                end_of_text=NO_END,
                max_new_tokens=count,
                num_samples=num_samples,
                seed=11,
            )
        )

    alone = texts(PROMPTS[:1])
    assert texts(PROMPTS)[:2] == alone
    assert texts(PROMPTS[::-1])[-2:] == alone
    assert texts([*PROMPTS, list(range(20))])[:2] == alone  # the bucket is the whole context
    assert texts(PROMPTS[:1], num_samples=5)[:2] == alone
    longer = texts(PROMPTS[:1], count=26)  # another bucket of new tokens
    assert [text[:9] for text in longer] == alone


def test_samples_and_seeds(build: Build) -> None:
    """Samples differ, the same seed gives the same, and a prompt's order counts."""
    model, params = build()

    def texts(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return tokens_of(
            generate(
                model,
                params,
                prompts,
                sampling=HOT,
                end_of_text=NO_END,
                max_new_tokens=9,
                num_samples=5,
                seed=seed,
            )
        )

    first = texts(PROMPTS, 2**32 - 1)
    assert len({tuple(text) for text in first}) == len(first) == 20
    assert texts(PROMPTS, 2**32 - 1) == first
    other = texts(PROMPTS, 1)
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_every_draw_is_fresh(build: Build) -> None:
    """A model of zeros makes all tokens equal: what comes out is the randomness itself."""
    model, params = build()
    params = jax.tree.map(jnp.zeros_like, params)
    got = tokens_of(
        generate(
            model,
            params,
            [[1], [2]],
            sampling=SamplingConfig(1.0),
            end_of_text=NO_END,
            max_new_tokens=28,
            num_samples=200,
        )
    )
    counts = np.bincount(np.ravel(got), minlength=VOCAB)
    assert len(counts) == VOCAB  # padding is never drawn
    assert stats.chisquare(counts).pvalue > 1e-3
    # A position, a sample or a prompt that is not folded in shows as columns or rows alike.
    table = np.array(got)
    for a, b in [
        (table[:, :-1], table[:, 1:]),
        (table[:-1], table[1:]),
        (table[:200], table[200:]),
    ]:
        assert np.mean(a == b) < 3 / VOCAB


def test_first_token_has_the_models_distribution(build: Build) -> None:
    """Chi-square of 1,500 samples of one prompt."""
    model, params = build()
    hidden_BTD, _ = model.apply({"params": params}, jnp.array(PROMPTS[:1]))
    logits = unembed(hidden_BTD[0, -1], output_embedding(params), VOCAB)
    expected = 1500 * np.asarray(jax.nn.softmax(logits), np.float64)[:VOCAB]
    got = generate(
        model,
        params,
        PROMPTS[:1],
        sampling=SamplingConfig(1.0),
        end_of_text=NO_END,
        max_new_tokens=1,
        num_samples=1500,
    )
    observed = np.bincount(np.ravel(tokens_of(got)), minlength=VOCAB)
    common = expected >= 5
    seen = np.append(observed[common], observed[~common].sum())
    hoped = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(seen, hoped * 1500 / hoped.sum()).pvalue > 1e-3


def test_end_of_text_ends_a_row(build: Build) -> None:
    """Each row by itself; the end is not part of the text; the loop stops with the last row."""
    model, params = build()
    whole = tokens_of(
        generate(model, params, PROMPTS, sampling=GREEDY, end_of_text=NO_END, max_new_tokens=16)
    )
    end = whole[2][3]
    got = generate(model, params, PROMPTS, sampling=GREEDY, end_of_text=end, max_new_tokens=16)
    for text, completion in zip(whole, got, strict=True):
        cut = text.index(end) if end in text else 16
        assert completion.tokens == text[:cut]
        assert completion.stop_reason == ("end_of_text" if end in text else "length")
    assert {completion.stop_reason for completion in got} == {"end_of_text", "length"}

    request = build_request(
        PROMPTS[2:3], [16], context=29, sampling=GREEDY, seed=0, end_of_text=end
    )
    tokens, lengths = decode(
        params, request, model=model, kind=GREEDY.kind, num_samples=1, new_slots=16
    )
    written = whole[2].index(end) + 1
    assert lengths.tolist() == [written - 1]
    assert tokens[0, :written].tolist() == whole[2][:written]
    assert tokens[0, written:].tolist() == [0] * (16 - written)  # no step was taken for these


def test_end_of_text_as_the_last_allowed_token(build: Build) -> None:
    model, params = build()
    (text,) = tokens_of(
        generate(model, params, [[5]], sampling=GREEDY, end_of_text=NO_END, max_new_tokens=4)
    )
    (got,) = generate(model, params, [[5]], sampling=GREEDY, end_of_text=text[3], max_new_tokens=4)
    assert got == Completion(text[:3], "end_of_text")


def test_empty_prompt_starts_from_end_of_text(build: Build) -> None:
    model, params = build()
    empty, explicit = generate(
        model, params, [[], [9]], sampling=HOT, end_of_text=9, max_new_tokens=7
    )
    assert empty == explicit


def test_no_tokens_asked_for(build: Build) -> None:
    model, params = build()
    got = generate(
        model, params, PROMPTS, sampling=HOT, end_of_text=0, max_new_tokens=0, num_samples=2
    )
    assert got == [Completion([], "length")] * 8
    assert generate(model, params, [], sampling=HOT, end_of_text=0) == []


def test_second_call_compiles_nothing(build: Build, compilations: list[str]) -> None:
    """Other prompts, lengths, seeds and settings of the same buckets and kind."""
    model, params = build()
    samples = 7  # as no other test here asks for
    generate(
        model,
        params,
        PROMPTS[:2],
        sampling=HOT,
        end_of_text=0,
        max_new_tokens=9,
        num_samples=samples,
    )
    assert len(compilations) == 1  # the listener hears, and all of it is one program
    again = Transformer(model.config, VOCAB, jnp.float32)  # an equal model, not the same one
    generate(
        again,
        params,
        [PROMPTS[3], PROMPTS[2]],
        sampling=SamplingConfig(0.3, 7, 0.5),
        end_of_text=4,
        max_new_tokens=13,
        num_samples=samples,
        seed=5,
        context=27,
    )
    assert len(compilations) == 1


def while_bodies(hlo: str) -> list[str]:
    """The computations of compiled HLO that are bodies of loops."""
    computations = {}
    for text in re.split(r"\n(?=%|ENTRY)", hlo):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", text)
        if name:
            computations[name[1]] = text
    return [computations[name] for name in re.findall(r"while\(.*?body=%?([\w.\-]+)", hlo)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loop_copies_and_casts_nothing_big(build: Build, dtype: Any) -> None:
    """Neither a cache nor the embedding is copied, transposed or cast at each step."""
    model, params = build(dtype=dtype)
    request = build_request(PROMPTS, [16] * 4, context=29, sampling=HOT, seed=0, end_of_text=NO_END)
    arguments = {"model": model, "kind": HOT.kind, "num_samples": 1, "new_slots": 16}
    traced = decode.trace(params, request, **arguments)

    cache, embedding = (4, 32, 3, 10), (384, 60)
    (loop,) = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "while"]
    inputs = {var.aval.shape: var.aval.dtype for var in loop.invars}
    assert inputs[cache] == dtype and inputs[embedding] == dtype
    for eqn in loop.params["body_jaxpr"].eqns:
        if eqn.primitive.name == "convert_element_type":
            assert eqn.outvars[0].aval.shape not in (cache, embedding)

    if dtype == jnp.bfloat16:
        return  # XLA's CPU backend computes bf16 in fp32, which is its own affair
    body = max(while_bodies(traced.lower().compile().as_text()), key=len)
    shapes = "|".join(",".join(map(str, shape)) for shape in (cache, embedding))
    assert re.search(rf"\[(?:{shapes})\]", body)
    assert not re.findall(rf"= \w+\[(?:{shapes})\]\S* (?:copy|transpose|convert)\(.*", body)


def test_bf16_decodes(build: Build) -> None:
    """The first tokens are those of a full forward in bf16."""
    model, params = build(dtype=jnp.bfloat16)
    got = generate(model, params, PROMPTS, sampling=GREEDY, end_of_text=NO_END, max_new_tokens=3)
    for prompt, completion in zip(PROMPTS, got, strict=True):
        assert completion.tokens == uncached(model, params, prompt, 3, slots=29)


def test_bad_ids_and_bad_logits(build: Build) -> None:
    model, params = build()
    with pytest.raises(InputError, match=r"prompt: got \[-1, 5\]; expected token ids from 0 to"):
        generate(model, params, [[5, -1]], sampling=GREEDY, end_of_text=0)
    with pytest.raises(InputError, match="307"):
        generate(model, params, [[307]], sampling=GREEDY, end_of_text=0)
    params = jax.tree.map(lambda p: p * np.float32(np.nan), params)
    with pytest.raises(InputError, match="not numbers"):
        generate(model, params, [[5]], sampling=HOT, end_of_text=0)


def test_context_rules(build: Build) -> None:
    """What does not fit is refused with the limit; by default each row takes what is left."""
    model, params = build()
    prompt = list(range(25))
    with pytest.raises(InputError, match="--max_new_tokens: got 5; expected at most 4"):
        generate(model, params, [prompt], sampling=GREEDY, end_of_text=0, max_new_tokens=5)
    for length in (29, 30):
        with pytest.raises(InputError, match=f"'{length} tokens'; expected fewer than .* 29"):
            generate(model, params, [list(range(length))], sampling=GREEDY, end_of_text=0)
    short, full = generate(model, params, [[5], prompt], sampling=GREEDY, end_of_text=NO_END)
    assert (len(short.tokens), len(full.tokens)) == (28, 4)
    assert new_token_limit(3, None, 29) == 26
    assert new_token_limit(3, None, 1000) == 256
    assert new_token_limit(3, 997, 1000) == 997
    with pytest.raises(InputError, match="--max_new_tokens: got -1"):
        new_token_limit(3, -1, 29)


def test_truncate_left() -> None:
    ids = list(range(40))
    assert truncate_left(ids, 9, 29) == ids[-20:]
    assert truncate_left(ids[:20], 9, 29) == ids[:20]
    assert truncate_left(ids[:21], 9, 29) == ids[1:21]
    assert truncate_left(ids, 0, 29) == ids[-29:]  # nothing is to be written: it may be full
    assert truncate_left(ids, None, 29) == ids[-15:]  # half the context for the new ones
    assert truncate_left(ids[:28], None, 29) == ids[:28]  # it fits
    assert len(truncate_left(list(range(2000)), None, 1000)) == 744
    assert truncate_left(ids, 28, 29) == ids[-1:]
    with pytest.raises(InputError, match="--max_new_tokens: got 29; expected at most 28"):
        truncate_left(ids, 29, 29)


def test_raising_the_context(make_config: Callable[..., Any]) -> None:
    for position in ("rope", "sinusoidal", "learned"):
        config = make_config({"model.position": position}).model
        assert resolve_context(config, None) == 29
        assert resolve_context(config, 17) == 17
        if position == "learned":
            with pytest.raises(InputError, match="--context: got 30; expected at most .* = 29"):
                resolve_context(config, 30)
        else:
            assert resolve_context(config, 30) == 30
    with pytest.raises(InputError, match="--context: got 1"):
        resolve_context(config, 1)


def test_buckets() -> None:
    """Few, powers of two, never above the context unless the length is."""
    assert [bucket(n, 100) for n in (1, 16, 17, 33, 64, 65, 100)] == [16, 16, 32, 64, 64, 100, 100]
    assert bucket(5, 7) == 7
    assert all(bucket(n, 50) >= n for n in range(1, 51))
