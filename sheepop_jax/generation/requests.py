"""Generation settings and their validation: sampling, context and number of new tokens.

Does not import jax, so that invalid flags are reported immediately.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.errors import InputError

DEFAULT_MAX_NEW_TOKENS = 256  # less if the context is shorter

# Outside this range, fp32 division by the temperature yields 0/0 or inf/inf.
_COLDEST, _HOTTEST = 1e-30, 1e30

MAX_POSITIONS = 2**30 - 1  # the sum of the prompt and new-token buckets must fit int32


MAX_LOGIT_BIASES = 300  # as many as the OpenAI API allows
MAX_LOGPROBS = 20


class Kind(NamedTuple):
    """Which sampling operations a compiled step contains; their values are traced.

    Attributes:
        sampled: whether any row may be sampled; otherwise all are greedy.
        top_k, top_p, min_p: the filters.
        adjusted: penalties and logit biases.
        logprobs: whether log-probabilities are returned.
        as_needed: the step contains every operation, and a batch that needs none of the last five
            skips them.
    """

    sampled: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    adjusted: bool = False
    logprobs: bool = False
    as_needed: bool = False


ALL = Kind(True, True, True, True, True, True, as_needed=True)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings, in the order in which they apply.

    Attributes:
        temperature: divides the logits, after the penalties and biases; 0 means greedy decoding.
        top_k: sample only from the k most probable tokens; 0 disables it.
        top_p: sample from the smallest set of most probable tokens whose total probability reaches
            this value, after top_k; 1 disables it.
        min_p: sample only from tokens at least this times as probable as the most probable one;
            0 disables it.
        repetition_penalty: divides the positive and multiplies the negative logits of every token
            of the prompt and the text; 1 disables it.
        presence_penalty: subtracted from the logits of every token in the new text.
        frequency_penalty: subtracted from them once for each occurrence.
        logit_bias: (token id, number) pairs, added to the logits. At most `MAX_LOGIT_BIASES`.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

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
        if not 0 <= self.min_p <= 1:
            raise InputError("min_p", self.min_p, "a number from 0 to 1", "0 to disable it")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            rule = "a number from 0.001 to 1000"
            raise InputError("repetition_penalty", self.repetition_penalty, rule, "1 to disable it")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -100 <= getattr(self, name) <= 100:
                rule = "a number from -100 to 100"
                raise InputError(name, getattr(self, name), rule, "0 to disable it")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            rule = f"at most {MAX_LOGIT_BIASES} tokens"
            raise InputError("logit_bias", f"{len(self.logit_bias)} tokens", rule)
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                rule = "token ids with numbers from -100 to 100"
                raise InputError("logit_bias", f"{token}: {bias}", rule)

    @property
    def kind(self) -> Kind:
        """The operations that these settings need."""
        if self.temperature == 0:
            return Kind(adjusted=self._adjusts)
        return Kind(
            sampled=True,
            top_k=self.top_k > 0,
            top_p=self.top_p < 1,
            min_p=self.min_p > 0,
            adjusted=self._adjusts,
        )

    @property
    def _adjusts(self) -> bool:
        penalties = (self.repetition_penalty != 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    @property
    def fp32_temperature(self) -> float:
        """The temperature, clipped to the range that fp32 division supports unless it is 0."""
        return min(max(self.temperature, _COLDEST), _HOTTEST) if self.temperature else 0.0


@dataclass(frozen=True)
class Request:
    """One text to write. It depends on these settings alone, not on the texts beside it.

    Attributes:
        prompt: token ids; an empty prompt starts from end-of-text.
        sampling: sampling settings.
        max_new_tokens: maximum new tokens; None for the rest of the context, at most
            `DEFAULT_MAX_NEW_TOKENS`.
        seed: random seed in [0, 2**32).
        sample: number of this text among those of the same prompt and seed.
        logprobs: number of most probable tokens to report at each position, besides the chosen one;
            None reports no log-probabilities.

    Raises:
        InputError: a value is out of range.
    """

    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    max_new_tokens: int | None = None
    seed: int = 0
    sample: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", self.seed, "an integer in [0, 2**32)")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InputError("logprobs", self.logprobs, f"an integer from 0 to {MAX_LOGPROBS}")


StopReason = Literal["end_of_text", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token before any sampling setting, in nats.

    Attributes:
        token: its id.
        logprob: its log-probability.
        top: ids and log-probabilities of the most probable tokens, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Output:
    """The tokens of one request since the last step.

    Attributes:
        id: of the request.
        tokens: new token ids, without the final end-of-text.
        logprobs: one for each token, and one for a final end-of-text; empty unless asked for.
        stop_reason: "end_of_text", or "length" if the limit of new tokens was reached first; None
            if the text has not ended.
    """

    id: int
    tokens: list[int]
    logprobs: list[TokenLogprob]
    stop_reason: StopReason | None


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt: `Output` of a whole text."""

    tokens: list[int]
    stop_reason: StopReason


@dataclass(frozen=True)
class GenerationConfig:
    """Generation settings.

    Attributes:
        sampling: sampling settings.
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
