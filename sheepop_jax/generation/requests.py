"""What may be asked of decoding: the sampling settings, the context, the number of new tokens.

Imports no jax, so that a wrong flag is refused before anything slow starts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.errors import InputError

DEFAULT_MAX_NEW_TOKENS = 256  # unless the context holds less

# Outside of these, fp32 division by the temperature gives 0/0 or inf/inf.
_COLDEST, _HOTTEST = 1e-30, 1e30

MAX_POSITIONS = 2**30 - 1  # a prompt's and the new ones together are counted in int32


class Kind(NamedTuple):
    """What a compiled sampling step depends on; everything else about sampling is traced."""

    greedy: bool
    top_k: bool
    top_p: bool


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 = off.
        top_p: draw from the smallest set of most probable tokens that reaches this probability,
            of what top_k left; 1 = off.

    Raises:
        InputError: a value breaks its rule.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            rule = "a finite number of at least 0"
            raise InputError("--temperature", self.temperature, rule, "0 for greedy, 1 for as-is")
        if self.top_k < 0:
            raise InputError("--top_k", self.top_k, "at least 0", "0 to turn it off")
        if not 0 < self.top_p <= 1:
            raise InputError("--top_p", self.top_p, "a number in (0, 1]", "1 to turn it off")

    @property
    def kind(self) -> Kind:
        """The static part."""
        if self.temperature == 0:
            return Kind(greedy=True, top_k=False, top_p=False)
        return Kind(greedy=False, top_k=self.top_k > 0, top_p=self.top_p < 1)

    @property
    def fp32_temperature(self) -> float:
        """The temperature, within what fp32 can divide by; the coldest is as good as greedy."""
        return min(max(self.temperature, _COLDEST), _HOTTEST)


def resolve_context(model: ModelConfig, requested: int | None) -> int:
    """The number of positions that a prompt and its completion may fill.

    Args:
        model: the architecture; its `max_seq_len` is the default.
        requested: `--context`; beyond `max_seq_len` only where positions are computed, not learned.

    Raises:
        InputError: below 2, more than int32 counts, or than a learned table of positions has.
    """
    if requested is None:
        return model.max_seq_len
    if requested < 2:
        raise InputError("--context", requested, "at least 2 (one token of prompt, one new)")
    if requested > MAX_POSITIONS:
        raise InputError("--context", requested, f"at most {MAX_POSITIONS}")
    if model.position == "learned" and requested > model.max_seq_len:
        rule = f"at most model.max_seq_len = {model.max_seq_len}: its positions are learned"
        raise InputError("--context", requested, rule)
    return requested


def new_token_limit(
    prompt_length: int, max_new_tokens: int | None, context: int, name: str = "--prompt"
) -> int:
    """How many tokens may follow a prompt: `max_new_tokens`, or by default what fits, 256 at most.

    `name` is what an error calls the prompt.

    Raises:
        InputError: the prompt fills the context, or more is asked for than the context holds.
    """
    if max_new_tokens is not None and max_new_tokens < 0:
        raise InputError("--max_new_tokens", max_new_tokens, "at least 0")
    if max_new_tokens == 0 and prompt_length == context:
        return 0
    if prompt_length >= context:
        rule = f"fewer than the context of {context}"
        hint = "--truncate left, or a larger --context"
        raise InputError(name, f"{prompt_length} tokens", rule, hint)
    room = context - prompt_length
    if max_new_tokens is None:
        return min(room, DEFAULT_MAX_NEW_TOKENS)
    if max_new_tokens > room:
        rule = f"at most {room}: a context of {context} less a prompt of {prompt_length} tokens"
        hint = "fewer tokens, --truncate left, or a larger --context"
        raise InputError("--max_new_tokens", max_new_tokens, rule, hint)
    return max_new_tokens


def truncate_left(ids: Sequence[int], max_new_tokens: int | None, context: int) -> list[int]:
    """The last tokens of a prompt, as many as leave room for the new ones.

    Without `max_new_tokens`, a prompt that fits stays whole; of one that does not, so much is kept
    that the default number of new tokens fits, or half the context if that is less.

    Raises:
        InputError: the new tokens alone fill the context.
    """
    if max_new_tokens is None:
        if len(ids) < context:
            return list(ids)
        max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, context // 2)
    kept = context - max_new_tokens
    if kept < 1:
        rule = f"at most {context - 1}: a context of {context} less one token of prompt"
        raise InputError("--max_new_tokens", max_new_tokens, rule, "a larger --context")
    return list(ids[-kept:])
