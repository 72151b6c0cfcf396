"""`generate` as the tests vary it, and its compiled loop."""

from collections.abc import Sequence
from typing import Any

from sheepop_jax.generation import engine
from sheepop_jax.generation.decode import advance
from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig
from sheepop_jax.model.transformer import Transformer


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    end_of_text: int,
    **options: Any,
) -> list[engine.Completion]:
    """Completions of token ids; `options` are fields of `GenerationConfig`."""
    config = GenerationConfig(sampling, **options)
    return engine.generate(model, params, prompts, end_of_text, config)


def decoding_loop(
    model: Transformer, params: Any, prompts: list[list[int]], config: GenerationConfig
) -> Any:
    """The traced `advance` that `generate` runs for its prompts."""
    texts, program, slots = engine.plan_texts(model, params, prompts, engine.NO_END, config)
    batch = engine.prefilled_batch(program, texts, (len(texts), len(texts)), slots)
    return advance.trace(*batch.arguments(program.size, None), **program.static)
