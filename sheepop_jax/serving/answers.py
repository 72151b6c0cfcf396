"""Generated tokens → the JSON of answers, whole or in pieces."""

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sheepop_jax.serving.token_texts import Offsets, TokenTexts

_NO_CHANCE = -9999.0  # JSON has no infinity; the value that vLLM writes


class Entry(NamedTuple):
    """A token of an answer, its log-probability (None for the first), and the most probable."""

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


@dataclass
class Choice:
    """One text of an answer, or the next piece of it.

    Attributes:
        index: its number in the answer.
        text: the text.
        entries: its tokens, if log-probabilities were asked for.
        finish: "stop", "length", or None while more follows.
    """

    index: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens of a request and its answer."""

    prompt: int
    completion: int

    @property
    def body(self) -> dict[str, int]:
        """The JSON object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Answer(Protocol):
    """Writes the answers of one request."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer, all at once."""
        ...

    def opening(self, count: int) -> list[dict[str, Any]]:
        """The pieces of a stream of `count` texts that come before the first text."""
        ...

    def piece(self, choice: Choice) -> dict[str, Any]:
        """The next piece of a stream."""
        ...

    def closing(self, usage: Usage | None) -> list[dict[str, Any]]:
        """The pieces after the last text: the usage, if it was asked for."""
        ...


class _Answer:
    """What both kinds of answers share: the head of every object."""

    def __init__(self, model: str, texts: TokenTexts, usage_in_stream: bool, kind: str, id: str):
        self._texts, self._usage_in_stream = texts, usage_in_stream
        self._head = {"id": id + secrets.token_hex(12), "object": kind, "created": int(time.time())}
        self._head["model"] = model

    def _body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "choices": choices, **more}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # Where usage is asked for, all pieces but the last have null.
        return self._body(choices, **({"usage": None} if self._usage_in_stream else {}))

    def closing(self, usage: Usage | None) -> list[dict[str, Any]]:
        """See `Answer`."""
        return [] if usage is None else [self._body([], usage=usage.body)]


class CompletionAnswer(_Answer):
    """Answers of /v1/completions."""

    def __init__(self, model: str, texts: TokenTexts, with_logprobs: bool, usage_in_stream: bool):
        super().__init__(model, texts, usage_in_stream, "text_completion", "cmpl-")
        self._with_logprobs = with_logprobs
        self._offsets: dict[int, Offsets] = {}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """See `Answer`."""
        return self._body([self._choice(choice) for choice in choices], usage=usage.body)

    def opening(self, count: int) -> list[dict[str, Any]]:
        """See `Answer`."""
        return []

    def piece(self, choice: Choice) -> dict[str, Any]:
        """See `Answer`."""
        return self._chunk([self._choice(choice)])

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice) if self._with_logprobs else None,
            "finish_reason": choice.finish,
        }

    def _logprobs(self, choice: Choice) -> dict[str, list[Any]]:
        offsets = self._offsets.setdefault(choice.index, Offsets(self._texts))
        return {
            "text_offset": [offsets.next(entry.token) for entry in choice.entries],
            "token_logprobs": [_finite(entry.logprob) for entry in choice.entries],
            "tokens": [self._texts.text(entry.token) for entry in choice.entries],
            "top_logprobs": [self._top(entry) for entry in choice.entries],
        }

    def _top(self, entry: Entry) -> dict[str, float | None] | None:
        if entry.logprob is None:
            return None
        found: dict[str, float | None] = {}
        # The chosen token is always there. Two tokens may have one text: the more probable stays.
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self._texts.text(token), _finite(logprob))
        return found


class ChatAnswer(_Answer):
    """Answers of /v1/chat/completions."""

    def __init__(self, model: str, texts: TokenTexts, with_logprobs: bool, usage_in_stream: bool):
        super().__init__(model, texts, usage_in_stream, "chat.completion.chunk", "chatcmpl-")
        self._with_logprobs = with_logprobs

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """See `Answer`."""
        found = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        return {**self._body(found, usage=usage.body), "object": "chat.completion"}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """See `Answer`."""
        role = {"role": "assistant", "content": ""}
        return [self._delta(Choice(index), role) for index in range(count)]

    def piece(self, choice: Choice) -> dict[str, Any]:
        """See `Answer`."""
        has_content = choice.text or choice.finish is None
        return self._delta(choice, {"content": choice.text} if has_content else {})

    def _delta(self, choice: Choice, delta: dict[str, str]) -> dict[str, Any]:
        found = {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(choice) if choice.entries else None,
            "finish_reason": choice.finish,
        }
        return self._chunk([found])

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(entry.token, entry.logprob),
                "top_logprobs": [self._token(*one) for one in entry.top],
            }
            for entry in choice.entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._texts.text(token),
            "logprob": _finite(logprob),
            "bytes": list(self._texts.bytes(token)),
        }


def _finite(logprob: float | None) -> float | None:
    if logprob is None or math.isnan(logprob):
        return None
    return max(logprob, _NO_CHANCE)
