"""The thread that owns the engine and the device.

HTTP handlers run in the event loop and talk to it by commands: add texts, score prompts, cancel.
Results go back to the loop, all those of one step at once.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import Request
from sheepop_jax.generation.text import TextStream
from sheepop_jax.serving.answers import Entry
from sheepop_jax.serving.api_error import ApiError

log = logging.getLogger(__name__)

_SCORED_AT_ONCE = 8  # prompts, between two steps of the texts that are being written


class EngineLike(Protocol):
    """The part of `generation.engine.Engine` that the worker uses."""

    @property
    def num_active(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    def add(self, request: Request) -> int: ...
    def cancel(self, id: int) -> None: ...
    def step(self) -> Sequence[Any]: ...


# Token ids of texts, and how many of the most probable tokens → scores, as `evaluation.score`.
Score = Callable[[Sequence[Sequence[int]], int], Sequence[Any]]


@dataclass(frozen=True)
class Text:
    """A text to write, and the strings that end it."""

    request: Request
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """The next part of a text.

    Attributes:
        index: number of the text in its job.
        text: may be empty while a character or a possible stop string is incomplete.
        num_tokens: new tokens since the last piece.
        entries: those tokens and a final end-of-text, if log-probabilities were asked for.
        finish: set with the last piece.
    """

    index: int
    text: str
    num_tokens: int
    entries: list[Entry]
    finish: Literal["stop", "length"] | None


@dataclass(frozen=True)
class Scored:
    """The tokens of a prompt with their log-probabilities."""

    index: int
    entries: list[Entry]


@dataclass(frozen=True)
class Failed:
    """The job ends with an error."""

    error: ApiError


Event = Piece | Scored | Failed


class Job:
    """The texts and the prompts to score of one HTTP request.

    Created and read in the event loop: `async for event in job`, until the caller has all.
    """

    def __init__(
        self, texts: Sequence[Text], scores: Sequence[tuple[int, ...]] = (), top: int | None = None
    ):
        self.texts, self.scores, self.top = tuple(texts), tuple(scores), top or 0
        self.cancelled = False  # read by the worker, which drops what is still queued
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(self, event: Event) -> None:
        """Adds an event; in the event loop only."""
        self._events.put_nowait(event)

    def fail(self, error: ApiError) -> None:
        """Ends the job with an error; in the event loop only."""
        self.deliver(Failed(error))

    async def events(self) -> list[Event]:
        """Waits for an event; returns all that are there.

        Raises:
            ApiError: the job failed.
        """
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        for event in found:
            if isinstance(event, Failed):
                raise event.error
        return found


class _Command(NamedTuple):
    name: Literal["add", "cancel"]
    job: Job


@dataclass
class _Row:
    """A text that the engine is writing."""

    job: Job
    index: int
    stream: TextStream
    num_tokens: int = 0


class Worker:
    """Runs an engine in a thread of its own.

    Attributes:
        failure: what ended the thread, if anything did.
        num_active, num_waiting: of the engine, after its last step.
    """

    def __init__(self, make_engine: Callable[[], EngineLike], score: Score, tokenizer: Tokenizer):
        """Prepares a worker.

        Args:
            make_engine: called in the thread, which then owns the engine.
            score: called in the thread.
            tokenizer: of the texts.
        """
        self._make_engine, self._score, self._tokenizer = make_engine, score, tokenizer
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()  # None: stop
        self._rows: dict[int, _Row] = {}
        self._to_score: deque[tuple[Job, int]] = deque()
        self._events: list[tuple[Job, Event]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: Exception | None = None
        self.num_active = self.num_waiting = 0

    def start(self) -> None:
        """Starts the thread; returns when the engine is there.

        Raises:
            Exception: what `make_engine` raised.
        """
        self._thread.start()
        self._started.wait()
        if self.failure is not None:
            raise self.failure

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the thread after the current step."""
        self._commands.put(None)
        self._thread.join(timeout)

    def submit(self, job: Job) -> None:
        """Adds the texts of a job; in the event loop, whose `job.deliver` gets the results."""
        self._loop = asyncio.get_running_loop()
        self._commands.put(_Command("add", job))
        if self.failure is not None:  # it may have died before it saw the command
            job.deliver(Failed(_stopped()))

    def cancel(self, job: Job) -> None:
        """Frees the rows of a job before the next step."""
        job.cancelled = True
        self._commands.put(_Command("cancel", job))

    def _run(self) -> None:
        try:
            self._engine = self._make_engine()
            self._started.set()
            while self._take_commands():
                self._score_some()
                self._step()
                self._count()
                self._send()
        except Exception as error:
            log.debug("the engine failed", exc_info=True)
            self.failure = error
            self._fail_all()
        finally:
            self._started.set()

    def _take_commands(self) -> bool:
        """Runs the commands that came in; waits for one if there is nothing else to do."""
        while True:
            try:
                idle = not (self._rows or self._to_score)
                if idle:
                    self._count()  # a command may have ended the last text
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            if command.name == "add":
                self._add(command.job)
            else:
                self._drop(command.job)

    def _add(self, job: Job) -> None:
        if job.cancelled:
            return
        self._to_score.extend((job, index) for index, ids in enumerate(job.scores) if ids)
        try:
            for index, text in enumerate(job.texts):
                stream = TextStream(self._tokenizer, text.request.prompt, text.stop)
                self._rows[self._engine.add(text.request)] = _Row(job, index, stream)
        except InputError as error:
            self._refuse(job, error)
            self._send()

    def _count(self) -> None:
        self.num_active, self.num_waiting = self._engine.num_active, self._engine.num_waiting

    def _drop(self, job: Job) -> None:
        for id in [id for id, row in self._rows.items() if row.job is job]:
            self._engine.cancel(id)
            del self._rows[id]
        if any(other is job for other, _ in self._to_score):
            self._to_score = deque(item for item in self._to_score if item[0] is not job)

    def _score_some(self) -> None:
        """Scores a few prompts, so that the texts that are being written soon go on."""
        if not self._to_score:
            return
        count = min(len(self._to_score), _SCORED_AT_ONCE)
        chosen = [self._to_score.popleft() for _ in range(count)]
        try:
            texts = [job.scores[index] for job, index in chosen]
            found = self._score(texts, max(job.top for job, _ in chosen))
        except InputError as error:
            for job in {id(job): job for job, _ in chosen}.values():
                self._refuse(job, error)
            return
        for (job, index), scores in zip(chosen, found, strict=True):
            entries = [Entry(job.scores[index][0], None, ())]  # nothing predicts the first
            rows = zip(job.scores[index], scores.logprobs, scores.top, strict=True)
            entries += [Entry(token, logprob, best[: job.top]) for token, logprob, best in rows][1:]
            self._events.append((job, Scored(index, entries)))

    def _refuse(self, job: Job, error: InputError) -> None:
        self._drop(job)
        self._events.append((job, Failed(ApiError.from_input_error(error))))

    def _step(self) -> None:
        if not self._rows:
            return
        for output in self._engine.step():
            row = self._rows.get(output.id)
            if row is None:
                continue
            text, count = row.stream.push(output.tokens), len(output.tokens)
            if output.stop_reason is not None and not row.stream.stopped:
                text += row.stream.finish()
            finish: Literal["stop", "length"] | None = None
            entries = [Entry(one.token, one.logprob, one.top) for one in output.logprobs]
            if row.stream.stopped:
                # Tokens after the stop string are not part of the text.
                count = row.stream.num_tokens - row.num_tokens
                finish, entries = "stop", entries[:count]
            elif output.stop_reason is not None:
                finish = "stop" if output.stop_reason == "end_of_text" else "length"
            row.num_tokens += count
            if finish is not None:
                del self._rows[output.id]
                if output.stop_reason is None:
                    self._engine.cancel(output.id)
            self._events.append((row.job, Piece(row.index, text, count, entries, finish)))

    def _send(self) -> None:
        if not self._events:
            return
        events, self._events = self._events, []
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(_deliver, events)
        except RuntimeError:  # the loop is closed: nobody waits
            pass

    def _fail_all(self) -> None:
        """Every job, running or queued, gets an error."""
        jobs = {id(row.job): row.job for row in self._rows.values()}
        jobs |= {id(job): job for job, _ in self._to_score}
        self._rows, self._to_score = {}, deque()
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                jobs[id(command.job)] = command.job
        self._events += [(job, Failed(_stopped())) for job in jobs.values()]
        self._send()


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.deliver(event)


def _stopped() -> ApiError:
    return ApiError(500, "the engine stopped because of an error; the server is ending")
