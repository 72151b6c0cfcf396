"""Decoding against full forward passes, and the laws that a text must obey."""

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import (
    NO_END,
    bucket,
    plan_texts,
    prefilled_batch,
)
from sheepop_jax.generation.requests import (
    Completion,
    GenerationConfig,
    SamplingConfig,
    new_token_limit,
    resolve_context,
    truncate_left,
)
from sheepop_jax.model.transformer import Transformer, logits
from tests import reference
from tests.writing import decoding_loop, generate

pytestmark = pytest.mark.usefixtures("fast_compile")

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
    return logits(model, params, hidden_BTD[0, last])


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


# The default model, up to here, where a position is computed: the context can be raised.
CONTEXT = 53


def greedy(build: Build, prompts: list[list[int]], end_of_text: int = NO_END) -> list[Completion]:
    """Texts of four prompts by the default model: one compiled program for several tests."""
    assert len(prompts) == 4
    return generate(
        *build(),
        prompts,
        sampling=GREEDY,
        end_of_text=end_of_text,
        context=CONTEXT,
        max_new_tokens=42,
    )


@pytest.mark.parametrize(
    ("overrides", "context"),
    [
        ({}, CONTEXT),  # rope, 3 of 6 key/value heads, tied
        ({"model.position": "sinusoidal", "model.num_kv_heads": 1, "model.num_layers": 1}, 29),
        (
            {
                "model.position": "learned",
                "model.num_kv_heads": 0,
                "model.use_bias": True,
                "model.tie_embeddings": False,
                "model.num_layers": 1,
            },
            29,
        ),
    ],
    ids=["rope", "sinusoidal", "learned"],
)
def test_cached_is_uncached(build: Build, overrides: dict[str, Any], context: int) -> None:
    """Prompts of different lengths in one batch, token by token, to the end of the context."""
    model, params = build(overrides)
    count = context - len(PROMPTS[2])
    got = generate(
        model,
        params,
        PROMPTS,
        sampling=GREEDY,
        end_of_text=NO_END,
        context=context,
        max_new_tokens=count,
    )
    for prompt, completion in zip(PROMPTS, got, strict=True):
        assert completion.tokens == uncached(model, params, prompt, count, slots=context)
        assert completion.stop_reason == "length"
    assert len(set().union(*tokens_of(got))) > 12  # texts that hang prove little


def hot(build: Build, prompts: list[list[int]], **arguments: Any) -> list[Completion]:
    """Sampled texts by a model of one layer."""
    model, params = build({"model.num_layers": 1})
    arguments = {"seed": 11, "end_of_text": NO_END} | arguments
    return generate(model, params, prompts, sampling=HOT, context=CONTEXT, **arguments)


def hot_texts(build: Build, prompts: list[list[int]], **arguments: Any) -> list[list[int]]:
    return tokens_of(hot(build, prompts, **arguments))


def test_neither_batch_nor_padding_changes_a_text(build: Build) -> None:
    """Alone, and after others, a longer one among them, with more samples and more new tokens.

    So in other buckets of prompts and of new tokens.
    """
    alone = hot_texts(build, PROMPTS[:1], num_samples=2, max_new_tokens=9)
    among = hot_texts(build, [list(range(20)), *PROMPTS[::-1]], num_samples=5, max_new_tokens=26)
    assert [text[:9] for text in among[-5:-3]] == alone


def test_samples_and_seeds(build: Build) -> None:
    """Samples differ, the same seed gives the same, and a prompt's order counts."""
    prompts = [list(range(20)), *PROMPTS[::-1]]

    def texts(seed: int) -> list[list[int]]:
        return hot_texts(build, prompts, num_samples=5, max_new_tokens=26, seed=seed)

    first = texts(2**32 - 1)
    assert len({tuple(text) for text in first}) == len(first) == 25
    assert texts(2**32 - 1) == first
    other = texts(1)
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_draws_are_fresh_and_have_the_models_distribution(build: Build) -> None:
    """With parameters of 0 all tokens are equal: what comes out is the randomness itself."""
    model, params = build({"model.num_layers": 1})
    temperature, samples = 1.3, 750

    def draw(params: Any, count: int) -> np.ndarray:
        found = generate(
            model,
            params,
            [PROMPTS[0], PROMPTS[3]],
            sampling=SamplingConfig(temperature),
            end_of_text=NO_END,
            max_new_tokens=count,
            num_samples=samples,
        )
        return np.array(tokens_of(found))

    table = draw(jax.tree.map(jnp.zeros_like, params), 16)
    counts = np.bincount(np.ravel(table), minlength=VOCAB)
    assert len(counts) == VOCAB  # padding is never drawn
    assert stats.chisquare(counts).pvalue > 1e-3
    # A position, a sample or a prompt that is not folded in shows as columns or rows alike.
    for a, b in [
        (table[:, :-1], table[:, 1:]),
        (table[:-1], table[1:]),
        (table[:samples], table[samples:]),
    ]:
        assert np.mean(a == b) < 3 / VOCAB

    first = draw(params, 1).reshape(2, samples)
    for prompt, drawn in zip((PROMPTS[0], PROMPTS[3]), first, strict=True):
        logits = reference.logits(params, model.config, np.array([prompt]))[0, -1, :VOCAB]
        expected = samples * reference.softmax(logits / temperature)
        observed = np.bincount(drawn, minlength=VOCAB)
        common = expected >= 5
        seen = np.append(observed[common], observed[~common].sum())
        hoped = np.append(expected[common], expected[~common].sum())
        assert len(hoped) > 20
        assert stats.chisquare(seen, hoped * samples / hoped.sum()).pvalue > 1e-3


def test_end_of_text_ends_a_row(build: Build) -> None:
    """Each row by itself; the end is not part of the text; the loop stops with the last row."""
    whole = tokens_of(greedy(build, PROMPTS))
    end = whole[2][3]
    got = greedy(build, PROMPTS, end_of_text=end)
    for text, completion in zip(whole, got, strict=True):
        cut = text.index(end) if end in text else 42
        assert completion.tokens == text[:cut]
        assert completion.stop_reason == ("end_of_text" if end in text else "length")
    assert {completion.stop_reason for completion in got} == {"end_of_text", "length"}

    model, params = build()
    config = GenerationConfig(GREEDY, 42, context=CONTEXT)
    texts, program, slots = plan_texts(model, params, PROMPTS[2:3] * 4, end, config)
    outputs, _, steps = prefilled_batch(program, texts, (4, 4), slots).advance(42, None)
    written = whole[2].index(end)
    assert steps == written + 1  # no step was taken after the end
    assert [output.tokens for output in outputs] == [whole[2][:written]] * 4


def test_end_of_text_as_the_last_allowed_token(build: Build) -> None:
    arguments: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 9}
    for seed in range(9):
        text = hot(build, PROMPTS[:1], seed=seed, **arguments)[0].tokens
        if text[8] not in text[:8]:
            break
    got = hot(build, PROMPTS[:1], seed=seed, end_of_text=text[8], **arguments)[0]
    assert got == Completion(text[:8], "end_of_text")


def test_empty_prompt_starts_from_end_of_text(build: Build) -> None:
    empty, explicit, *_ = greedy(build, [[], [9], [5], [5]], end_of_text=9)
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
    model, params = build({"model.num_layers": 1})
    jax.jit(lambda x: 7 * x)(np.float32(3))
    assert compilations  # the listener hears
    compilations.clear()
    hot(build, PROMPTS[:1], num_samples=2, max_new_tokens=9)
    assert len(compilations) <= 2  # prefill and decode, if no test before compiled them
    compilations.clear()
    generate(
        Transformer(model.config, VOCAB, jnp.float32),  # an equal model, not the same one
        params,
        PROMPTS[2:3],
        sampling=SamplingConfig(0.3, 7, 0.5),
        end_of_text=4,
        max_new_tokens=13,
        num_samples=2,
        seed=5,
        context=CONTEXT - 2,
    )
    assert not compilations


def test_a_models_own_window_writes_past_the_context_without_a_restart(build: Build) -> None:
    model, params = build({"model.sliding_window": 9, "model.num_layers": 3})
    context = model.config.max_seq_len
    count, slots = 3 * context, 4 * context
    settings = {"sampling": GREEDY, "end_of_text": NO_END, "max_new_tokens": count}
    got = generate(model, params, PROMPTS[:2], slide=True, **settings)
    for prompt, completion in zip(PROMPTS, got, strict=False):
        assert completion.tokens == uncached(model, params, prompt, count, slots)
    assert len(set().union(*tokens_of(got))) > 12
    with pytest.raises(InputError):
        generate(model, params, PROMPTS[:2], slide=False, **settings)


SHORT = 11  # a context in which a text of 40 tokens slides several times


def window_of(text: list[int]) -> list[int]:
    """What the model sees of a text to predict its next token, by the definition in the docs."""
    kept = SHORT // 2
    if len(text) < SHORT:
        return text
    step = SHORT - kept
    return text[step * ((len(text) - kept) // step) :]


@functools.partial(jax.jit, static_argnums=0)
def drawn_at(model: Any, params: Any, tokens_BT: Any, last: Any, key: Any, place: Any) -> Any:
    """The token that temperature 4 draws after `last`, for this place in the text."""
    logits = logits_at(model, params, tokens_BT, last)
    noise = jax.random.gumbel(jax.random.fold_in(key, place), logits.shape)
    return (logits / 4 + noise).argmax()


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_past_the_context_each_token_is_from_a_full_forward_over_the_window(
    build: Build, position: str
) -> None:
    """Rows that slide at different times, and rows that end before others do."""
    model, params = build({"model.num_layers": 1, "model.position": position})
    prompts = [[3, 41, 7], [5], [2, 3, 5, 7, 11, 13, 17, 19, 23, 29], [41, 3, 7]]

    def write(count: int, end_of_text: int = NO_END) -> list[Completion]:
        settings = {"context": SHORT, "max_new_tokens": count, "slide": True, "seed": 5}
        sampling = SamplingConfig(4.0)
        return generate(
            model, params, prompts, sampling=sampling, end_of_text=end_of_text, **settings
        )

    got = write(40)
    for prompt, completion in zip(prompts, got, strict=True):
        crc = zlib.crc32(np.array(prompt, "<u4").tobytes())
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), np.uint32(crc)), 0)
        text, widths = list(prompt), set()
        for place in range(len(prompt), len(prompt) + 40):
            window = window_of(text)
            widths.add(len(window))
            tokens = np.zeros((1, SHORT), np.int32)
            tokens[0, : len(window)] = window
            text.append(int(drawn_at(model, params, tokens, len(window) - 1, key, place)))
        assert widths >= set(range(SHORT // 2, SHORT))
        assert completion == Completion(text[len(prompt) :], "length")
    whole = tokens_of(got)
    assert len(set().union(*whole)) > 40
    assert write(12) == [Completion(text[:12], "length") for text in whole]
    end = whole[0][SHORT + 3]
    for text, completion in zip(whole, write(40, end), strict=True):
        cut = text.index(end) if end in text else 40
        reason = "end_of_text" if end in text else "length"
        assert completion == Completion(text[:cut], reason)


def test_draws_past_the_context_are_fresh_and_those_of_the_row(build: Build) -> None:
    model, params = build({"model.num_layers": 1})
    settings = {"context": SHORT, "max_new_tokens": 40, "slide": True, "end_of_text": NO_END}

    def draw(params: Any, prompts: list[list[int]], **more: Any) -> list[list[int]]:
        sampling = SamplingConfig(1.3)
        return tokens_of(
            generate(model, params, prompts, sampling=sampling, **{**settings, **more})
        )

    table = np.array(draw(jax.tree.map(jnp.zeros_like, params), [[3, 41, 7]], num_samples=60))
    step = SHORT - SHORT // 2
    for a, b in ((table[:, :-step], table[:, step:]), (table[:-1], table[1:])):
        assert np.mean(a == b) < 3 / VOCAB
    among = draw(params, [[5], [2] * 9, [3, 41, 7]], num_samples=2)
    assert among[4:] == draw(params, [[3, 41, 7]], num_samples=2)
    inside = draw(params, [[3, 41, 7]], num_samples=2, max_new_tokens=SHORT - 3, slide=False)
    assert [text[: SHORT - 3] for text in among[4:]] == inside


def test_a_sliding_window_is_one_more_prefill(build: Build, compilations: list[str]) -> None:
    model, params = build({"model.num_layers": 1})
    settings = {"slide": True, "num_samples": 2, "context": 40, "end_of_text": NO_END}
    for prompt, count, programs in (([5, 2], 100, 3), ([3, 41, 7], 61, 0), ([9, 2], 170, 0)):
        compilations.clear()
        generate(model, params, [prompt], sampling=HOT, max_new_tokens=count, **settings)
        assert len(compilations) <= programs


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
    model, params = build({"model.num_layers": 1}, dtype)
    traced = decoding_loop(model, params, PROMPTS, GenerationConfig(GREEDY, 16, context=29))
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


def test_bad_ids_and_bad_logits(build: Build) -> None:
    model, params = build({"model.num_layers": 1})
    for ids, got in [([5, -1], [-1, 5]), ([307], [307, 307])]:
        with pytest.raises(InputError) as error:
            generate(model, params, [ids], sampling=GREEDY, end_of_text=0)
        assert (error.value.field, error.value.got) == ("prompt", got)
        assert "306" in error.value.expected
    params = jax.tree.map(lambda p: p * np.float32(np.nan), params)
    with pytest.raises(InputError) as error:
        generate(
            model,
            params,
            PROMPTS[:1],
            sampling=HOT,
            end_of_text=0,
            context=CONTEXT,
            max_new_tokens=9,
            num_samples=2,
        )
    assert error.value.field == "parameters" and "NaN logits" in error.value.got


def test_context_rules(build: Build) -> None:
    """What does not fit is refused with the limit; by default each row takes what is left."""
    model, params = build({"model.num_layers": 1})
    prompt = list(range(25))
    with pytest.raises(InputError) as error:
        generate(model, params, [prompt], sampling=GREEDY, end_of_text=0, max_new_tokens=5)
    assert (error.value.field, error.value.got) == ("max_new_tokens", 5)
    assert "at most 4" in error.value.expected
    for length in (29, 30):
        with pytest.raises(InputError) as error:
            generate(model, params, [list(range(length))], sampling=GREEDY, end_of_text=0)
        assert error.value.got == f"{length} tokens" and "29" in error.value.expected
    short, full = generate(model, params, [[5], prompt], sampling=GREEDY, end_of_text=NO_END)
    assert (len(short.tokens), len(full.tokens)) == (28, 4)
    pairs = generate(
        model, params, [[5], prompt], sampling=GREEDY, end_of_text=NO_END, num_samples=2
    )
    assert [len(completion.tokens) for completion in pairs] == [28, 28, 4, 4]
    assert {completion.stop_reason for completion in pairs} == {"length"}
    assert new_token_limit(3, None, 29) == 26
    assert new_token_limit(3, None, 1000) == 256
    assert new_token_limit(3, 997, 1000) == 997
    assert new_token_limit(3, 5000, 1000, slide=True) == 5000
    assert new_token_limit(3, None, 1000, slide=True) == 256
    for learned, expected in ((True, "997"), (False, f"at most {2**30 - 4}")):
        with pytest.raises(InputError) as error:
            new_token_limit(3, 2**30, 1000, slide=True, learned=learned)
        assert expected in error.value.expected
        assert ("learned" in error.value.expected) == learned
    with pytest.raises(InputError) as error:
        new_token_limit(3, -1, 29)
    assert (error.value.field, error.value.got) == ("max_new_tokens", -1)


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
    with pytest.raises(InputError) as error:
        truncate_left(ids, 29, 29)
    assert (error.value.field, error.value.got) == ("max_new_tokens", 29)
    assert "at most 28" in error.value.expected


def test_raising_the_context(make_config: Callable[..., Any]) -> None:
    for position in ("rope", "sinusoidal", "learned"):
        config = make_config({"model.position": position}).model
        assert resolve_context(config, None) == 29
        assert resolve_context(config, 17) == 17
        if position == "learned":
            with pytest.raises(InputError) as error:
                resolve_context(config, 30)
            assert (error.value.field, error.value.got) == ("context", 30)
            assert "29" in error.value.expected
        else:
            assert resolve_context(config, 30) == 30
    with pytest.raises(InputError) as error:
        resolve_context(config, 1)
    assert (error.value.field, error.value.got) == ("context", 1)


def test_buckets() -> None:
    """Few, powers of two, never above the context unless the length is."""
    assert [bucket(n, 100) for n in (1, 16, 17, 33, 64, 65, 100)] == [16, 16, 32, 64, 64, 100, 100]
    assert bucket(5, 7) == 7
    assert all(bucket(n, 50) >= n for n in range(1, 51))
