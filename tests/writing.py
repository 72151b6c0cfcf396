"""`generate` with its configuration as keywords, as the tests vary them."""

from collections.abc import Sequence
from typing import Any

from sheepop_jax.generation import engine
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
