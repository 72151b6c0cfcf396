"""Continuous batching: the same texts as `generate`, whoever else is in the batch."""

import collections
import random
from collections.abc import Callable
from typing import Any

import pytest

from sheepop_jax.generation.engine import Engine, EngineConfig, generate
from sheepop_jax.generation.requests import (
    GenerationConfig,
    Output,
    Request,
    SamplingConfig,
)

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


def alone(model: Any, params: Any, request: Request, context: int) -> tuple[list[int], str]:
    """The text that `generate` writes for a request by itself."""
    assert request.sample < 3
    config = GenerationConfig(
        request.sampling, request.max_new_tokens, 3, request.seed, context, slide=True
    )
    completion = generate(model, params, [request.prompt], END, config)[request.sample]
    return completion.tokens, completion.stop_reason


def requests(count: int, context: int, seed: int) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(
            tuple(chance.randrange(VOCAB) for _ in range(chance.randrange(context))),
            MIXED[i % len(MIXED)],
            chance.choice([1, 2, 7, 30]),
            seed=chance.randrange(3),
            sample=chance.randrange(3),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("options", "context"),
    [({}, 40), ({"model.sliding_window": 9}, 29), ({"model.position": "sinusoidal"}, 29)],
    ids=["rope", "window", "sinusoidal"],
)
def test_a_text_is_its_own(build: Build, options: dict[str, Any], context: int) -> None:
    """Requests join at random steps, some are cancelled; each text is that of the request alone."""
    model, params = build({"model.num_layers": 1, **options})
    engine = Engine(model, params, END, EngineConfig(context, slots=9, chunk=5))
    chance, asked, found = random.Random(1), {}, collections.defaultdict(list)
    queue = requests(28, context, seed=2)
    cancelled = set()
    while queue or engine.num_active or engine.num_waiting:
        for _ in range(min(len(queue), chance.choice([0, 0, 1, 5]))):
            request = queue.pop()
            asked[engine.add(request)] = request
        if chance.random() < 0.1:
            cancelled.add(chance.choice(sorted(asked)) if asked else 0)
            for number in cancelled:
                engine.cancel(number)
        for output in engine.step():
            found[output.id].append(output)
    assert 0 < len(cancelled) < 12
    for number, request in asked.items():
        expected = alone(model, params, request, context)
        tokens, reason = text(found[number]) if found[number] else ([], None)
        if number in cancelled and reason is None:
            assert tokens == expected[0][: len(tokens)]
        else:
            assert (tokens, reason) == expected
