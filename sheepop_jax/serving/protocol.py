"""JSON bodies of the API → validated requests. Knows no HTTP and no model.

Fields that are unknown are ignored, and null is a field's default. A field that would change the
form of the answer, and is not supported, is refused.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import SamplingConfig
from sheepop_jax.serving.api_error import ApiError
from sheepop_jax.serving.chat import ROLES, Message
from sheepop_jax.serving.settings import LONGEST_STOP, MAX_DEPTH, MAX_STOPS

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as the OpenAI API has it
MAX_LOGPROBS = 20
# Also matches a string that never ends: otherwise every quote in it would be tried as a start.
_STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """What completions and chat completions have in common.

    Attributes:
        sampling: sampling settings.
        max_tokens: maximum new tokens; None for the rest of the context.
        n: texts for each prompt.
        seed: in [0, 2**32); None for a random one.
        stop: strings that end a text.
        logprobs: number of most probable tokens to report besides the chosen one; None reports
            nothing.
        stream: whether the answer comes in pieces.
        include_usage: whether the last piece of a stream counts the tokens.
    """

    sampling: SamplingConfig
    max_tokens: int | None
    n: int
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class CompletionRequest:
    """A body of POST /v1/completions: each prompt as text or ids; `echo` repeats it."""

    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    options: Options


@dataclass(frozen=True)
class ChatRequest:
    """A body of POST /v1/chat/completions."""

    model: str | None
    messages: tuple[Message, ...]
    options: Options


@dataclass(frozen=True)
class TokenizeRequest:
    """A body of POST /tokenize: a text, or the messages of a conversation."""

    content: str | tuple[Message, ...]
    add_special_tokens: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ApiError: not UTF-8, not JSON, not an object, too deep, or with NaN or Infinity.
    """
    try:
        text = body.decode()
        if _depth(text) > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep")
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise ApiError(400, f"the body is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return value


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Validates a body of POST /v1/completions.

    Raises:
        ApiError: 400, with the field at fault.
    """
    fields = _Fields(body)
    fields.refuse("suffix", "text is only written after a prompt")
    n = fields.integer("n", 1, low=1, high=_INT32)
    if fields.integer("best_of", n, low=1, high=_INT32) != n:
        raise ApiError.refused("best_of", body["best_of"], f"{n} (n): texts are not ranked")
    logprobs = None if body.get("logprobs") is False else fields.count("logprobs", MAX_LOGPROBS)
    max_tokens = fields.integer("max_tokens", DEFAULT_MAX_TOKENS, low=0, high=_INT32)
    options = _options(fields, n, max_tokens, logprobs)
    prompts = _prompts(body.get("prompt"))
    return CompletionRequest(fields.model(), prompts, fields.boolean("echo", False), options)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Validates a body of POST /v1/chat/completions.

    Raises:
        ApiError: 400, with the field at fault.
    """
    fields = _Fields(body)
    wanted = body.get("response_format")
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text"):
        raise ApiError.refused("response_format", wanted, '{"type": "text"}, the only form')
    top = fields.count("top_logprobs", MAX_LOGPROBS)
    if not fields.boolean("logprobs", False):
        if top is not None:
            raise ApiError.refused("top_logprobs", top, "logprobs to be true")
    else:
        top = top or 0
    name = "max_completion_tokens"
    if body.get(name) is None:  # the older name
        name = "max_tokens"
    max_tokens = None if body.get(name) is None else fields.integer(name, 1, low=1, high=_INT32)
    options = _options(fields, fields.integer("n", 1, low=1, high=_INT32), max_tokens, top)
    return ChatRequest(fields.model(), _messages(body.get("messages")), options)


def parse_tokenize(body: dict[str, Any]) -> TokenizeRequest:
    """Validates a body of POST /tokenize.

    Raises:
        ApiError: 400, with the field at fault.
    """
    special = _Fields(body).boolean("add_special_tokens", True)
    if body.get("prompt") is None and body.get("messages") is not None:
        return TokenizeRequest(_messages(body["messages"]), special)
    if not isinstance(prompt := body.get("prompt"), str):
        raise ApiError.refused("prompt", prompt, "a text")
    return TokenizeRequest(prompt, special)


def parse_detokenize(body: dict[str, Any]) -> tuple[int, ...]:
    """Validates a body of POST /detokenize.

    Raises:
        ApiError: 400, with the field at fault.
    """
    tokens = body.get("tokens")
    if not _are_ids(tokens):
        raise ApiError.refused("tokens", tokens, "a list of token ids")
    return tuple(tokens)


class _Fields:
    """Typed access to a body; a field that is missing or null has its default."""

    def __init__(self, body: dict[str, Any]):
        self._body = body

    def model(self) -> str | None:
        model = self._body.get("model")
        if model is not None and not isinstance(model, str):
            raise ApiError.refused("model", model, "a name")
        return model

    def refuse(self, name: str, reason: str) -> None:
        if self._body.get(name) is not None:
            raise ApiError(400, f"{name} is not supported: {reason}", name, "unsupported_parameter")

    def boolean(self, name: str, default: bool) -> bool:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ApiError.refused(name, value, "true or false")
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self._body.get(name)
        if value is None:
            return default
        if not _is_int(value) or not low <= value <= high:
            raise ApiError.refused(name, value, f"an integer from {low} to {high}")
        return int(value)

    def count(self, name: str, most: int) -> int | None:
        if self._body.get(name) is None:
            return None
        return self.integer(name, 0, low=0, high=most)

    def number(self, name: str, default: float) -> float:
        value = self._body.get(name)
        if value is None:
            return default
        if not _is_number(value):
            raise ApiError.refused(name, value, "a finite number")
        return float(value)


def _options(fields: _Fields, n: int, max_tokens: int | None, logprobs: int | None) -> Options:
    body = fields._body
    seed = body.get("seed")
    if seed is not None:
        seed = fields.integer("seed", 0, low=0, high=2**32 - 1)
    usage = body.get("stream_options")
    if usage is not None and not isinstance(usage, dict):
        raise ApiError.refused("stream_options", usage, "an object")
    return Options(
        sampling=_sampling(fields),
        max_tokens=max_tokens,
        n=n,
        seed=seed,
        stop=_stops(body.get("stop")),
        logprobs=logprobs,
        stream=fields.boolean("stream", False),
        include_usage=_Fields(usage or {}).boolean("include_usage", False),
    )


def _sampling(fields: _Fields) -> SamplingConfig:
    top_k = fields.integer("top_k", 0, low=-1, high=_INT32)
    try:
        return SamplingConfig(
            temperature=fields.number("temperature", 1.0),
            top_k=max(top_k, 0),  # vLLM's clients turn it off by -1
            top_p=fields.number("top_p", 1.0),
            min_p=fields.number("min_p", 0.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            presence_penalty=fields.number("presence_penalty", 0.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0),
            logit_bias=_logit_bias(fields._body.get("logit_bias")),
        )
    except InputError as error:
        raise ApiError.from_input_error(error) from None


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    rule = "an object of token ids and numbers"
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ApiError.refused("logit_bias", value, rule)
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and _is_number(bias)):
            raise ApiError.refused("logit_bias", {key: bias}, rule)
        found[int(key)] = float(bias)
    return tuple(sorted(found.items()))


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    rule = f"a string, or a list of at most {MAX_STOPS}, of at most {LONGEST_STOP} characters"
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ApiError.refused("stop", value, rule)
    for stop in stops:
        if not isinstance(stop, str) or len(stop) > LONGEST_STOP:
            raise ApiError.refused("stop", stop, rule)
    return tuple(dict.fromkeys(stop for stop in stops if stop))


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if _are_ids(value):
        return (tuple(value),)
    if isinstance(value, list):
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if all(_are_ids(one) for one in value):
            return tuple(map(tuple, value))
    rule = "a text, a list of texts, a list of token ids, or a list of lists of token ids"
    raise ApiError.refused("prompt", value, rule)


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ApiError.refused("messages", value, "a list of at least one message")
    return tuple(_message(f"messages[{i}]", one) for i, one in enumerate(value))


def _message(name: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise ApiError.refused(name, value, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError.refused(f"{name}.role", role, "one of " + ", ".join(ROLES))
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join(_part(f"{name}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ApiError.refused(f"{name}.content", content, "a text, or a list of text parts")
    return Message(role, content)


def _part(name: str, value: object) -> str:
    if isinstance(value, dict) and value.get("type") == "text":
        if isinstance(text := value.get("text"), str):
            return text
    raise ApiError.refused(name, value, '{"type": "text", "text": ...}')


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(_is_int(one) for one in value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # An integer may be too large for a float.
    return abs(value) < 1e300 and math.isfinite(value)


def _depth(text: str) -> int:
    """The deepest nesting; stops counting soon after `MAX_DEPTH`."""
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", _STRINGS.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            break
    return deepest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
