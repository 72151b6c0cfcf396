"""Generation settings and their validation: sampling, context and number of new tokens.

Does not import jax, so that invalid flags are reported immediately.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.errors import InputError

DEFAULT_MAX_NEW_TOKENS = 256  # less if the context is shorter

# Outside this range, fp32 division by the temperature yields 0/0 or inf/inf.
_COLDEST, _HOTTEST = 1e-30, 1e30

MAX_POSITIONS = 2**30 - 1  # the sum of the prompt and new-token buckets must fit int32


class Kind(NamedTuple):
    """Static arguments of a compiled sampling step; all other settings are traced."""

    greedy: bool
    top_k: bool
    top_p: bool


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings.

    Attributes:
        temperature: divides the logits; 0 means greedy decoding.
        top_k: sample only from the k most probable tokens; 0 disables it.
        top_p: sample from the smallest set of most probable tokens whose total probability reaches
            this value, after top_k; 1 disables it.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            rule = "a finite number of at least 0"
            raise InputError(
                "temperature", self.temperature, rule, "0 for greedy or 1 for no scaling"
            )
        if self.top_k < 0:
            raise InputError("top_k", self.top_k, "at least 0", "0 to disable it")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "a number in (0, 1]", "1 to disable it")

    @property
    def kind(self) -> Kind:
        """The static part of the settings."""
        if self.temperature == 0:
            return Kind(greedy=True, top_k=False, top_p=False)
        return Kind(greedy=False, top_k=self.top_k > 0, top_p=self.top_p < 1)

    @property
    def fp32_temperature(self) -> float:
        """The temperature clipped to the range that fp32 division supports."""
        return min(max(self.temperature, _COLDEST), _HOTTEST)


@dataclass(frozen=True)
class GenerationConfig:
    """Generation settings.

    Attributes:
        sampling: temperature, top-k, top-p.
        max_new_tokens: maximum new tokens per row; None for the rest of the context, at most
            `DEFAULT_MAX_NEW_TOKENS`.
        num_samples: completions per prompt.
        seed: random seed in [0, 2**32).
        context: maximum positions per row; None for `model.max_seq_len`.
        slide: whether `max_new_tokens` may exceed the context, with a sliding window (see
            `generation.engine`); never with learned positions.
    """

    sampling: SamplingConfig = SamplingConfig()
    max_new_tokens: int | None = None
    num_samples: int = 1
    seed: int = 0
    context: int | None = None
    slide: bool = False


def resolve_context(model: ModelConfig, requested: int | None) -> int:
    """Returns the maximum number of positions of a prompt plus its completion.

    Args:
        model: the architecture; its `max_seq_len` is the default.
        requested: `--context`; may exceed `max_seq_len` unless positions are learned.

    Raises:
        InputError: `requested` is below 2, above `MAX_POSITIONS`, or above the number of learned
            positions.
    """
    if requested is None:
        return model.max_seq_len
    if requested < 2:
        raise InputError("context", requested, "at least 2 (one prompt token, one new token)")
    if requested > MAX_POSITIONS:
        raise InputError("context", requested, f"at most {MAX_POSITIONS}")
    if model.position == "learned" and requested > model.max_seq_len:
        rule = f"at most {model.max_seq_len} (model.max_seq_len, with learned positions)"
        raise InputError("context", requested, rule)
    return requested


def new_token_limit(
    prompt_length: int,
    max_new_tokens: int | None,
    context: int,
    name: str = "prompt",
    *,
    slide: bool = False,
    learned: bool = False,
) -> int:
    """Returns the maximum number of new tokens for a prompt.

    Args:
        prompt_length: tokens of the prompt.
        max_new_tokens: requested number; None for the rest of the context, at most 256.
        context: maximum positions per row.
        name: name of the prompt in error messages.
        slide: whether new tokens may exceed the context, with a sliding window.
        learned: whether the model has learned positions, where `slide` has no effect.

    Raises:
        InputError: the prompt fills the context, or the new tokens do not fit into it.
    """
    if max_new_tokens is not None and max_new_tokens < 0:
        raise InputError("max_new_tokens", max_new_tokens, "at least 0")
    if max_new_tokens == 0 and prompt_length == context:
        return 0
    if prompt_length >= context:
        rule = f"fewer than {context} tokens (the context)"
        hint = "`truncate` left or a larger `context`"
        raise InputError(name, f"{prompt_length} tokens", rule, hint)
    room = context - prompt_length
    if max_new_tokens is None:
        return min(room, DEFAULT_MAX_NEW_TOKENS)
    slide = slide and not learned
    if slide:
        room = MAX_POSITIONS - prompt_length
    if max_new_tokens > room:
        rule = f"at most {room} (context {context} minus {prompt_length} prompt tokens)"
        hint = "fewer tokens, `truncate` left, or a larger `context`"
        if learned:
            rule += "; learned positions end at the context"
            hint = "fewer tokens or `truncate` left"
        elif slide:
            rule, hint = f"at most {room}", ""
        raise InputError("max_new_tokens", max_new_tokens, rule, hint)
    return max_new_tokens


def truncate_left(ids: Sequence[int], max_new_tokens: int | None, context: int) -> list[int]:
    """Drops tokens from the start of a prompt until the prompt and its new tokens fit.

    Without `max_new_tokens`, a prompt shorter than the context is unchanged; a longer one is
    truncated to leave room for 256 new tokens or half the context, whichever is less.

    Raises:
        InputError: the new tokens alone fill the context.
    """
    if max_new_tokens is None:
        if len(ids) < context:
            return list(ids)
        max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, context // 2)
    kept = context - max_new_tokens
    if kept < 1:
        rule = f"at most {context - 1} (context {context} minus one prompt token)"
        raise InputError("max_new_tokens", max_new_tokens, rule, "a larger `context`")
    return list(ids[-kept:])
