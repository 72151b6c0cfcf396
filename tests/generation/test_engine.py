"""Continuous batching: the same texts as `generate`, whoever else is in the batch."""

import collections
import random
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import NO_END, Engine, EngineConfig, generate
from sheepop_jax.generation.requests import (
    GenerationConfig,
    Output,
    Request,
    SamplingConfig,
)
from tests import reference

pytestmark = pytest.mark.usefixtures("fast_compile")

VOCAB = 307
END = 11
Build = Callable[..., Any]
MIXED = (
    SamplingConfig(0.0),
    SamplingConfig(1.1),
    SamplingConfig(1.7, top_k=90, top_p=0.98),
    SamplingConfig(1.3, min_p=0.05, repetition_penalty=1.3),
    SamplingConfig(0.9, presence_penalty=0.7, frequency_penalty=0.4),
    SamplingConfig(0.0, repetition_penalty=1.5),
    SamplingConfig(1.2, logit_bias=((3, 4.0), (17, -100.0), (306, 2.5))),
)


def run(engine: Engine, steps: int = 10**6) -> dict[int, list[Output]]:
    """Steps until nothing is left to write; the outputs of each request."""
    found: dict[int, list[Output]] = collections.defaultdict(list)
    while (engine.num_active or engine.num_waiting or engine._finished) and steps:
        steps -= 1
        for output in engine.step():
            found[output.id].append(output)
    return found


def text(outputs: list[Output]) -> tuple[list[int], str | None]:
    assert all(output.stop_reason is None for output in outputs[:-1])
    return [token for output in outputs for token in output.tokens], outputs[-1].stop_reason


def requests(count: int, context: int, seed: int, configs: Any = MIXED) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(
            tuple(chance.randrange(VOCAB) for _ in range(chance.randrange(context))),
            chance.choice(configs),
            30,
            seed=5,
            sample=chance.randrange(2),
        )
        for _ in range(count)
    ]


def by_generate(
    model: Any, params: Any, asked: list[Request], context: int
) -> dict[Request, tuple[list[int], str]]:
    """The texts of all requests, a batch for each sampling configuration."""
    found = {}
    for sampling in {request.sampling for request in asked}:
        prompts = list(dict.fromkeys(r.prompt for r in asked if r.sampling == sampling))
        config = GenerationConfig(sampling, 30, 2, 5, context, slide=True)
        written = iter(generate(model, params, prompts, END, config))
        for prompt in prompts:
            for sample in range(2):
                request, completion = Request(prompt, sampling, 30, 5, sample), next(written)
                found[request] = completion.tokens, completion.stop_reason
    return found


@pytest.mark.parametrize(
    ("options", "context", "configs"),
    [
        ({}, 40, MIXED[2:5]),
        ({"model.sliding_window": 9}, 29, MIXED[3:4]),
        ({"model.position": "sinusoidal"}, 29, MIXED[2:3]),
    ],
    ids=["rope", "window", "sinusoidal"],
)
def test_a_text_is_its_own(
    build: Build, options: dict[str, Any], context: int, configs: Any
) -> None:
    """Requests join at random steps, some are cancelled; each text is as `generate` writes it."""
    model, params = build({"model.num_layers": 1, **options})
    engine = Engine(model, params, END, EngineConfig(context, slots=9, chunk=5))
    chance, found = random.Random(1), collections.defaultdict(list)
    asked: dict[int, Request] = {}
    cancelled: set[int] = set()
    queue = requests(28, context, 2, configs)
    expected = by_generate(model, params, queue, context)
    while queue or engine.num_active or engine.num_waiting:
        for _ in range(min(len(queue), chance.choice([0, 0, 1, 5]))):
            request = queue.pop()
            asked[engine.add(request)] = request
        if asked and chance.random() < 0.1:
            cancelled.add(chance.choice(sorted(asked)))
            for number in sorted(cancelled):
                engine.cancel(number)
        for output in engine.step():
            found[output.id].append(output)
    assert 0 < len(cancelled) < 12
    for number, request in asked.items():
        tokens, reason = text(found[number]) if found[number] else ([], None)
        if number in cancelled and reason is None:
            assert tokens == expected[request][0][: len(tokens)]
        else:
            assert (tokens, reason) == expected[request]


def brute_force(model: Any, params: Any, request: Request) -> list[int]:
    """Greedy with penalties, by a float64 forward pass over the whole text for each token."""
    config, tokens = request.sampling, list(request.prompt)
    for _ in range(request.max_new_tokens or 0):
        logits = reference.logits(params, model.config, np.array([tokens]))[0, -1, :VOCAB]
        new = tokens[len(request.prompt) :]
        for token in set(tokens):
            logits[token] *= config.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        for token in set(new):
            logits[token] -= config.presence_penalty
            logits[token] -= config.frequency_penalty * new.count(token)
        for token, bias in config.logit_bias:
            logits[token] += bias
        tokens.append(int(logits.argmax()))
    return tokens[len(request.prompt) :]


def test_penalties_are_brute_force(build: Build) -> None:
    model, params = build()
    configs = [
        SamplingConfig(0),
        SamplingConfig(0, repetition_penalty=0.4),  # repeats more
        SamplingConfig(0, presence_penalty=-2.5),
        SamplingConfig(0, frequency_penalty=-1.5, logit_bias=((7, 3.0), (41, -9.0))),
    ]
    engine = Engine(model, params, NO_END, EngineConfig(slots=4, chunk=3))
    asked = [Request((3, 41, 7), config, 16) for config in configs]
    numbers = [engine.add(request) for request in asked]
    found = run(engine)
    texts = [text(found[number])[0] for number in numbers]
    assert texts == [brute_force(model, params, request) for request in asked]
    assert len({tuple(tokens) for tokens in texts}) == 4


def test_log_probabilities_are_those_of_the_formula(build: Build) -> None:
    """Of the raw distribution, whatever the settings, and of a final end-of-text too."""
    model, params = build({"model.num_layers": 1})
    engine = Engine(model, params, [300, END], EngineConfig(slots=3, chunk=4))
    hot = SamplingConfig(1.5, top_k=20, logit_bias=((END, 6.0),))
    asked = [
        Request((3, 41, 7), hot, 20, seed, logprobs=top) for seed, top in enumerate([0, 5, 20, 3])
    ]
    numbers = [engine.add(request) for request in asked]
    plain = engine.add(Request((5,), SamplingConfig(1.0), 9))
    found = run(engine)
    assert all(not output.logprobs for output in found[plain])
    ended = 0
    for number, request in zip(numbers, asked, strict=True):
        tokens, reason = text(found[number])
        reported = [entry for output in found[number] for entry in output.logprobs]
        seen = [entry.token for entry in reported]
        assert seen == tokens + [END] * (reason == "end_of_text")
        ended += reason == "end_of_text"
        whole = np.array([[*request.prompt, *seen]])
        logits = reference.logits(params, model.config, whole)[0, :, :VOCAB]
        logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        logprobs = logprobs[len(request.prompt) - 1 : -1]
        for entry, expected in zip(reported, logprobs, strict=True):
            assert entry.logprob == pytest.approx(expected[entry.token], abs=1e-4)
            assert len(entry.top) == request.logprobs
            assert all(value == pytest.approx(expected[t], abs=1e-4) for t, value in entry.top)
            assert [t for t, _ in entry.top[:3]] == np.argsort(-expected)[:3].tolist()[
                : len(entry.top)
            ]
            assert all(value == entry.logprob for t, value in entry.top if t == entry.token)
    assert ended


def test_any_of_several_end_tokens_ends_a_text(build: Build) -> None:
    model, params = build({"model.num_layers": 1})
    request = Request((5,), SamplingConfig(1.1), 20, seed=9)
    [completion] = generate(
        model, params, [request.prompt], NO_END, GenerationConfig(request.sampling, 20, seed=9)
    )
    whole = completion.tokens
    for ends in ((300, whole[6]), (whole[9], whole[6]), (whole[6], whole[9])):
        cut = min(whole.index(end) for end in ends if end in whole)
        engine = Engine(model, params, ends, EngineConfig(slots=1))
        number = engine.add(request)
        assert text(run(engine)[number]) == (whole[:cut], "end_of_text")


def test_two_hundred_mixed_requests_compile_twelve_programs(
    build: Build, compilations: list[str]
) -> None:
    """Short and long prompts, alone and together, all settings: rows and caches of all sizes."""
    model, params = build({"model.num_layers": 1, "model.max_seq_len": 600})
    chance = random.Random(3)
    engine = Engine(model, params, END, EngineConfig(slots=8))
    compilations.clear()
    shapes, done, asked = set(), 0, []
    for lengths in ([5], [300], [5, 6, 7], [300, 5]):
        for length in lengths:
            engine.add(Request((5,) * length, max_new_tokens=20))
        while outputs := engine.step():
            shapes.add((len(engine._batch.texts), engine._batch.slots))
            done += sum(output.stop_reason is not None for output in outputs)
    while done < 200:
        lengths = chance.choice([(0, 1, 5, 17), (5, 100, 300)])
        for _ in range(chance.choice([1, 3, 9])):
            length = chance.choice(lengths)
            prompt = tuple(chance.randrange(VOCAB) for _ in range(length))
            logprobs = chance.choice([None, 3])
            new, seed = chance.choice([1, 5, 40]), chance.randrange(9)
            asked.append(Request(prompt, chance.choice(MIXED), new, seed, 0, logprobs))
            engine.add(asked[-1])
        for _ in range(chance.choice([2, 60])):
            done += sum(output.stop_reason is not None for output in engine.step())
    assert shapes == {(1, 192), (1, 640), (8, 192), (8, 640)}
    assert len(compilations) <= 12


def test_warming_up_leaves_nothing_to_compile(build: Build, compilations: list[str]) -> None:
    model, params = build({"model.num_layers": 2, "model.max_seq_len": 70})
    params = jax.device_put(params, jax.devices()[0])  # as a run's are
    engine = Engine(model, params, END, EngineConfig(slots=3))
    engine.warm_up()
    compilations.clear()
    for request in requests(9, 69, seed=5):
        engine.add(request)
    run(engine)
    assert not compilations


def test_others_go_on_while_a_long_prompt_is_read(build: Build) -> None:
    """One chunk of a prompt per step, and a step of every text in between."""
    model, params = build({"model.num_layers": 1, "model.max_seq_len": 600})
    engine = Engine(model, params, NO_END, EngineConfig(slots=2, chunk=1))
    first = engine.add(Request((5,), max_new_tokens=30))
    assert [output.id for output in engine.step()] == [first]
    second = engine.add(Request(tuple(range(300)) + tuple(range(270)), max_new_tokens=3))
    for _ in range(4):  # 569 tokens: four chunks of 128, and the rest
        assert engine.num_waiting == 1
        assert [output.id for output in engine.step()] == [first]
    assert [output.id for output in engine.step()] == [first, second]
    assert (engine.num_waiting, engine.num_active) == (0, 2)


def test_cancelling_frees_the_row_before_the_next_step(build: Build) -> None:
    """A text in the batch, one that is being prefilled, and one that waits."""
    model, params = build({"model.num_layers": 1, "model.max_seq_len": 600})
    engine = Engine(model, params, NO_END, EngineConfig(slots=2, chunk=1))
    first, second = (engine.add(Request((n,), max_new_tokens=30)) for n in (5, 6))
    third = engine.add(Request(tuple(range(200)), max_new_tokens=2))
    fourth = engine.add(Request((8,), max_new_tokens=2))
    assert {output.id for output in engine.step()} == {first, second}
    engine.cancel(first)
    engine.cancel(12345)
    assert [output.id for output in engine.step()] == [second]  # the first chunk of `third`
    engine.cancel(third)
    assert {output.id for output in engine.step()} == {second, fourth}
    engine.cancel(second)
    engine.cancel(fourth)
    assert (engine.num_active, engine.num_waiting) == (0, 0)
    assert engine.step() == []


def test_a_batch_shrinks_when_few_texts_are_left(build: Build) -> None:
    model, params = build({"model.num_layers": 1})
    engine = Engine(model, params, NO_END, EngineConfig(slots=8, chunk=1))
    request = Request((5,), SamplingConfig(1.0), 25, seed=3)
    number = engine.add(request)
    for n in range(4):
        engine.add(Request((6, n), max_new_tokens=3))
    rows, outputs = set(), []
    while engine.num_active or engine.num_waiting:
        outputs += [output for output in engine.step() if output.id == number]
        rows.add(len(engine._batch.texts))
    assert rows == {1, 8} and len(engine._batch.texts) == 1
    config = GenerationConfig(request.sampling, 25, seed=3)
    [completion] = generate(model, params, [request.prompt], NO_END, config)
    assert text(outputs) == (completion.tokens, "length")


def test_bad_requests_are_refused_and_cost_nothing(build: Build) -> None:
    model, params = build({"model.num_layers": 1})
    engine = Engine(model, params, END, EngineConfig(40))
    for field, request in (
        ("prompt", Request((307,))),
        ("prompt", Request(tuple(range(40)))),
        ("max_new_tokens", Request((5,), max_new_tokens=-1)),
        ("logit_bias", Request((5,), SamplingConfig(logit_bias=((307, 1.0),)))),
    ):
        with pytest.raises(InputError) as error:
            engine.add(request)
        assert error.value.field == field
    for field, settings in (("seed", {"seed": 2**32}), ("logprobs", {"logprobs": 21})):
        with pytest.raises(InputError) as error:
            Request((5,), **settings)
        assert error.value.field == field
    assert engine.num_waiting == 0 and engine.step() == []
    nothing = engine.add(Request((5,), max_new_tokens=0))
    assert engine.step() == [Output(nothing, [], [], "length")]


def test_logits_that_are_not_finite_end_the_engine(build: Build) -> None:
    model, params = build({"model.num_layers": 1})
    params = {**params, "embedding": params["embedding"] * np.float32(np.nan)}
    engine = Engine(model, params, END)
    engine.add(Request((5,)))
    with pytest.raises(InputError) as error:
        run(engine)
    assert error.value.field == "parameters"
