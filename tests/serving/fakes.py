"""An engine without a model: its texts follow from the request alone, and a test can hold it."""

import math
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sheepop_jax.data.preprocess.train_tokenizer import train_bpe
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import Request
from sheepop_jax.serving.app import make_app
from sheepop_jax.serving.metrics import Metrics
from sheepop_jax.serving.service import ServedModel, Service
from sheepop_jax.serving.settings import Access, Limits
from sheepop_jax.serving.worker import Worker

CONTEXT = 400
CHUNK = 3
END_EVERY = 60  # one token in so many is end-of-text


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Output:
    id: int
    tokens: list[int]
    logprobs: list[TokenLogprob]
    stop_reason: str | None


@dataclass(frozen=True)
class TokenScores:
    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]


def make_tokenizer() -> Tokenizer:
    """Byte-level: its tokens may be parts of characters."""
    return train_bpe(iter(["the cat sat on the mat. User: Assistant: ünïcödé €"] * 8), 300)


def token_at(request: Request, place: int, end: int) -> int:
    """The token that the fake writes at a place; `end` for end-of-text."""
    key = repr((request.prompt, request.seed, request.sample, place)).encode()
    drawn = zlib.crc32(key)
    return end if drawn % END_EVERY == 0 else 1 + drawn % 290


def logprob_of(token: int) -> float:
    """Each token has its own."""
    return -math.log(1 + token) - 0.1


def text_of(request: Request, end: int) -> tuple[list[int], str]:
    """All that the fake writes: tokens and the reason why it stops."""
    tokens: list[int] = []
    for place in range(request.max_new_tokens or 0):
        token = token_at(request, place, end)
        if token == end:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


@dataclass
class FakeEngine:
    """Writes `CHUNK` tokens of each row in a step.

    Attributes:
        gate: each step waits for it.
        hold_after: number of the step that closes it.
        steps: steps done.
        failure: raised by the next step.
    """

    end: int
    slots: int = 2
    gate: threading.Event = field(default_factory=threading.Event)
    hold_after: int = 0
    steps: int = 0
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        self.rows: dict[int, tuple[Request, int]] = {}
        self.waiting: dict[int, Request] = {}
        self.next_id = 0

    @property
    def num_active(self) -> int:
        return len(self.rows)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def add(self, request: Request) -> int:
        if len(request.prompt) > CONTEXT:
            raise InputError("prompt", f"{len(request.prompt)} tokens", "fewer")
        self.next_id += 1
        self.waiting[self.next_id] = request
        return self.next_id

    def cancel(self, id: int) -> None:
        self.rows.pop(id, None)
        self.waiting.pop(id, None)

    def step(self) -> Sequence[Output]:
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.steps += 1
        for id in list(self.waiting)[: self.slots - len(self.rows)]:
            self.rows[id] = self.waiting.pop(id), 0
        found = []
        for id, (request, place) in list(self.rows.items()):
            found.append(output := self._output(id, request, place))
            if output.stop_reason is None:
                self.rows[id] = request, place + CHUNK
            else:
                del self.rows[id]
        if self.steps == self.hold_after:
            self.gate.clear()
        return found

    def _output(self, id: int, request: Request, place: int) -> Output:
        limit = request.max_new_tokens or 0
        tokens, reason = [], None
        logprobs: list[TokenLogprob] = []
        for at in range(place, min(place + CHUNK, limit)):
            token = token_at(request, at, self.end)
            if request.logprobs is not None:
                logprobs.append(scored(token, request.logprobs))
            if token == self.end:
                reason = "end_of_text"
                break
            tokens.append(token)
        if reason is None and place + CHUNK >= limit:
            reason = "length"
        return Output(id, tokens, logprobs, reason)


def scored(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, logprob_of(token), tuple((i, logprob_of(i)) for i in range(top)))


def fake_score(texts: Sequence[Sequence[int]], top: int) -> list[TokenScores]:
    """As `scoring.score`."""
    found = []
    for ids in texts:
        one = [scored(id, top) for id in ids]
        logprobs = [math.nan, *(entry.logprob for entry in one[1:])]
        found.append(TokenScores(logprobs, [(), *(entry.top for entry in one[1:])]))
    return found


@dataclass
class Fake:
    """A server without a socket: the app, and what is behind it."""

    app: Any
    service: Service
    worker: Worker
    engine: FakeEngine
    tokenizer: Tokenizer

    def close(self) -> None:
        self.engine.gate.set()
        self.worker.stop()


ANYBODY, LIMITS = Access(), Limits()


def make_fake(
    tokenizer: Tokenizer, access: Access = ANYBODY, limits: Limits = LIMITS, **engine: Any
) -> Fake:
    """A started fake, for `Fake.close`."""
    fake = FakeEngine(tokenizer.end_of_text, **engine)
    worker = Worker(lambda: fake, fake_score, tokenizer)
    worker.start()
    model = ServedModel("tiny", tokenizer, tokenizer.vocab_size, CONTEXT, slots=fake.slots)
    service = Service(model, worker, limits, Metrics())
    return Fake(make_app(service, access), service, worker, fake, tokenizer)
