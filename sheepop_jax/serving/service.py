"""What the routes do: bodies → jobs for the worker → answers."""

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import DEFAULT_MAX_NEW_TOKENS, Request, new_token_limit
from sheepop_jax.serving import protocol
from sheepop_jax.serving.answers import (
    Answer,
    ChatAnswer,
    Choice,
    CompletionAnswer,
    Usage,
)
from sheepop_jax.serving.api_error import ApiError
from sheepop_jax.serving.chat import ChatFormat, PlainChat
from sheepop_jax.serving.metrics import Metrics
from sheepop_jax.serving.protocol import Options
from sheepop_jax.serving.settings import Limits
from sheepop_jax.serving.token_texts import TokenTexts
from sheepop_jax.serving.worker import Event, Job, Piece, Scored, Text, Worker


@dataclass(frozen=True)
class ServedModel:
    """What is known of the model without computing.

    Attributes:
        name: the id in /v1/models.
        tokenizer: its tokenizer.
        vocab_size: V; ids of prompts are below it.
        context: maximum positions of a text.
        learned_positions: whether a text ends where the context does.
        slots: rows of the engine's batch.
        chat: how a conversation becomes a prompt.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    context: int
    learned_positions: bool = False
    slots: int = 8
    chat: ChatFormat = PlainChat()


@dataclass(frozen=True)
class Prepared:
    """A checked request: what to compute, and how to write the answer.

    Attributes:
        job: texts in the order of the answer's choices, and prompts to score.
        answer: writes the JSON.
        options: of the request.
        prompts: (ids, text) of each prompt; the text only if it is echoed.
        echo: whether the answer repeats the prompt.
    """

    job: Job
    answer: Answer
    options: Options
    prompts: tuple[tuple[tuple[int, ...], str], ...]
    echo: bool

    @property
    def num_choices(self) -> int:
        """The texts of the answer."""
        return len(self.prompts) * self.options.n


class _Order:
    """Puts the pieces of a request in order: the echo of a prompt, then the text.

    A text waits for the scores of its prompt, if they are asked for.
    """

    def __init__(self, prepared: Prepared):
        self._prepared = prepared
        self._held: dict[int, list[Choice]] = {}
        self._ready: list[Choice] = []
        self.unfinished = prepared.num_choices
        for number, (ids, text) in enumerate(prepared.prompts):
            for index in self._choices(number):
                if prepared.job.scores and ids:
                    self._held[index] = []
                elif prepared.echo:
                    self._add(Choice(index, text))
                if not prepared.job.texts:  # max_tokens is 0
                    self._add(Choice(index, finish="length"))

    def take(self, events: Sequence[Event]) -> list[Choice]:
        """The pieces that can be shown after these events."""
        for event in events:
            if isinstance(event, Scored):
                for index in self._choices(event.index):
                    held, text = self._held.pop(index), self._prepared.prompts[event.index][1]
                    self._ready += [Choice(index, text, event.entries), *held]
            elif isinstance(event, Piece):
                self._add(Choice(event.index, event.text, event.entries, event.finish))
        ready, self._ready = self._ready, []
        self.unfinished -= sum(choice.finish is not None for choice in ready)
        return ready

    def _add(self, choice: Choice) -> None:
        self._held.get(choice.index, self._ready).append(choice)

    def _choices(self, prompt: int) -> range:
        n = self._prepared.options.n
        return range(prompt * n, prompt * n + n)


class Service:
    """Answers requests for one model.

    Attributes:
        draining: whether the server is shutting down, and takes no new requests.
        in_flight: HTTP requests that are being answered.
    """

    def __init__(self, model: ServedModel, worker: Worker, limits: Limits, metrics: Metrics):
        self.model, self.worker, self.limits, self.metrics = model, worker, limits, metrics
        self.texts = TokenTexts(model.tokenizer)
        self.created = int(time.time())
        self.draining = False
        self.in_flight = 0
        self._pending = 0  # texts and prompts to score that were admitted
        self._jobs: set[Job] = set()

    def prepare_completion(self, body: bytes) -> Prepared:
        """Checks a body of POST /v1/completions. Touches no state: safe in any thread.

        Raises:
            ApiError: it is refused.
        """
        wanted = protocol.parse_completion(protocol.parse_json(body))
        self._check_model(wanted.model)
        options = wanted.options
        # Before the prompts are encoded: there may be a million.
        self._check_texts(len(wanted.prompts) * options.n)
        prompts = [self._encoded(prompt, wanted.echo) for prompt in wanted.prompts]
        texts = self._texts_to_write([ids for ids, _ in prompts], options, ())
        scored = wanted.echo and options.logprobs is not None
        answer = CompletionAnswer(
            self.model.name,
            self.texts,
            options.logprobs is not None,
            options.include_usage and options.stream,
        )
        job = Job(texts, [ids for ids, _ in prompts] if scored else (), options.logprobs)
        return Prepared(job, answer, options, tuple(prompts), wanted.echo)

    def prepare_chat(self, body: bytes) -> Prepared:
        """Checks a body of POST /v1/chat/completions. Touches no state: safe in any thread.

        Raises:
            ApiError: it is refused.
        """
        wanted = protocol.parse_chat(protocol.parse_json(body))
        self._check_model(wanted.model)
        options = wanted.options
        self._check_texts(options.n)
        chat = self.model.chat
        ids = tuple(self._encode_messages(wanted.messages, self._chat_room(options.max_tokens)))
        texts = self._texts_to_write([ids], options, chat.stop)
        answer = ChatAnswer(
            self.model.name,
            self.texts,
            options.logprobs is not None,
            options.include_usage and options.stream,
        )
        return Prepared(Job(texts), answer, options, ((ids, ""),), echo=False)

    def tokenize(self, body: bytes) -> dict[str, Any]:
        """The answer of POST /tokenize.

        A text that is exactly the end-of-text or BOS token is that token: lm-eval asks for their
        ids in this way. Within a text, they are text.

        Raises:
            ApiError: it is refused.
        """
        wanted = protocol.parse_tokenize(protocol.parse_json(body))
        tokenizer, content = self.model.tokenizer, wanted.content
        if not isinstance(content, str):
            ids = self._encode_messages(content, self.model.context)
        else:
            named = {self.texts.special(id): id for id in self._stream_ids}
            if content in named:
                ids = [named[content]]
            else:
                encode = tokenizer.encode_prompt if wanted.add_special_tokens else tokenizer.encode
                with _refusals("prompt"):
                    ids = encode(content)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.model.context}

    def detokenize(self, body: bytes) -> dict[str, Any]:
        """The answer of POST /detokenize.

        Raises:
            ApiError: it is refused.
        """
        ids = protocol.parse_detokenize(protocol.parse_json(body))
        self._check_ids("tokens", ids)
        return {"prompt": self.model.tokenizer.decode(ids, skip_special=False)}

    def tokenizer_info(self) -> dict[str, Any]:
        """The answer of GET /tokenizer_info."""
        tokenizer = self.model.tokenizer
        bos = tokenizer.bos_id
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if bos is None else self.texts.special(bos),
            "eos_token": self.texts.special(tokenizer.end_of_text),
            "pad_token": None,
            "add_bos_token": bos is not None,
            "chat_template": tokenizer.chat_template,
            "vocab_size": self.model.vocab_size,
            "model_max_length": self.model.context,
        }

    def models(self) -> list[dict[str, Any]]:
        """The entries of GET /v1/models."""
        return [
            {
                "id": self.model.name,
                "object": "model",
                "created": self.created,
                "owned_by": "sheepop_jax",
                "max_model_len": self.model.context,
                "chat": self.model.chat.is_template,
            }
        ]

    def admit(self, prepared: Prepared) -> None:
        """Gives a job to the worker; `release` must follow.

        Raises:
            ApiError: 429 if the queue is full.
        """
        size = self._size(prepared.job)
        if self._pending + size > self._capacity:
            self.metrics.refused.add()
            waits = {"Retry-After": str(self._retry_after())}
            message = f"the queue is full ({self._pending} texts are running or waiting)"
            raise ApiError(429, message, code="queue_full", headers=waits)
        self._pending += size
        self._jobs.add(prepared.job)
        self.metrics.prompt_tokens.add(sum(len(ids) for ids, _ in prepared.prompts))
        self.worker.submit(prepared.job)

    def release(self, prepared: Prepared) -> None:
        """Forgets a job; the worker stops at the next step if it still works on it."""
        if prepared.job in self._jobs:
            self._jobs.remove(prepared.job)
            self._pending -= self._size(prepared.job)
            self.worker.cancel(prepared.job)

    def abandon(self) -> None:
        """Ends all running jobs with an error, when the time to shut down is over."""
        for job in self._jobs:
            job.fail(shutting_down())

    @property
    def pending(self) -> int:
        """Texts that run or wait."""
        return self._pending

    async def whole(self, prepared: Prepared) -> dict[str, Any]:
        """The answer of an admitted request, all at once.

        Raises:
            ApiError: the job failed.
        """
        choices = [Choice(index) for index in range(prepared.num_choices)]
        completion = 0
        async for pieces, tokens in self._pieces(prepared):
            completion += tokens
            for piece in pieces:
                choice = choices[piece.index]
                choice.text += piece.text
                choice.entries += piece.entries
                choice.finish = piece.finish or choice.finish
        return prepared.answer.whole(choices, self._usage(prepared, completion))

    async def stream(self, prepared: Prepared) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer of an admitted request in pieces; those of one step come together.

        Raises:
            ApiError: the job failed.
        """
        answer, completion = prepared.answer, 0
        if opening := answer.opening(prepared.num_choices):
            yield opening
        async for pieces, tokens in self._pieces(prepared):
            completion += tokens
            shown = [piece for piece in pieces if piece.text or piece.entries or piece.finish]
            if shown:
                yield [answer.piece(piece) for piece in shown]
        usage = self._usage(prepared, completion) if prepared.options.include_usage else None
        if closing := answer.closing(usage):
            yield closing

    async def _pieces(self, prepared: Prepared) -> AsyncIterator[tuple[list[Choice], int]]:
        """The pieces of all texts as they come, with the number of new tokens in them."""
        order, started, is_first = _Order(prepared), time.perf_counter(), True
        yield order.take([]), 0
        while order.unfinished:
            events = await prepared.job.events()
            tokens = sum(event.num_tokens for event in events if isinstance(event, Piece))
            self.metrics.new_tokens.add(tokens)
            if is_first and tokens:
                self.metrics.first_token.observe(time.perf_counter() - started)
                is_first = False
            yield order.take(events), tokens

    def _usage(self, prepared: Prepared, completion: int) -> Usage:
        return Usage(sum(len(ids) for ids, _ in prepared.prompts), completion)

    def _texts_to_write(
        self, prompts: Sequence[tuple[int, ...]], options: Options, stop: tuple[str, ...]
    ) -> list[Text]:
        """The texts of all prompts, prompt by prompt; none if no new token is asked for."""
        seed = secrets.randbelow(2**32) if options.seed is None else options.seed
        self._check_bias(options)
        texts = []
        for ids in prompts:
            limit = self._limit(len(ids), options.max_tokens)
            for sample in range(options.n if limit else 0):
                request = Request(
                    prompt=ids,
                    sampling=options.sampling,
                    max_new_tokens=limit,
                    seed=seed,
                    sample=sample,
                    logprobs=options.logprobs,
                )
                texts.append(Text(request, tuple(dict.fromkeys((*options.stop, *stop)))))
        return texts

    def _limit(self, length: int, max_tokens: int | None) -> int:
        """The maximum of new tokens after a prompt of `length` tokens."""
        model, most = self.model, self.limits.max_new_tokens
        if max_tokens is None:
            max_tokens = max(1, min(model.context - length, most))
        if max_tokens > most:
            raise ApiError.refused("max_tokens", max_tokens, f"at most {most} (of this server)")
        try:
            return new_token_limit(
                max(length, 1),
                max_tokens,
                model.context,
                slide=True,
                learned=model.learned_positions,
            )
        except InputError as error:
            field = "max_tokens" if error.field == "max_new_tokens" else error.field
            rule = error.expected.replace("`", "")
            message = f"{field}: got {error.got}; expected {rule}"
            raise ApiError(400, message, field, "context_length_exceeded") from None

    def _encoded(self, prompt: str | tuple[int, ...], echo: bool) -> tuple[tuple[int, ...], str]:
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            with _refusals("prompt"):
                return tuple(tokenizer.encode_prompt(prompt)), prompt
        self._check_ids("prompt", prompt)
        return prompt, tokenizer.decode(prompt) if echo else ""

    def _encode_messages(self, messages: Sequence[Any], room: int) -> list[int]:
        with _refusals("messages"):
            return self.model.chat.encode(self.model.tokenizer, messages, room)

    def _chat_room(self, max_tokens: int | None) -> int:
        """The tokens of the context for the conversation before an answer."""
        context = self.model.context
        answer = DEFAULT_MAX_NEW_TOKENS if max_tokens is None else max_tokens
        return context - min(answer, context // 2)

    @property
    def _stream_ids(self) -> list[int]:
        return [self.model.tokenizer.end_of_text, *self.model.tokenizer.prompt_start]

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            check_name(name, self.model.name)

    def _check_texts(self, count: int) -> None:
        most = min(self.limits.max_texts, self._capacity)
        if count > most:
            raise ApiError.refused("n", f"{count} texts", f"at most {most} (prompts times n)")

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        size = self.model.vocab_size
        for id in ids:
            if not 0 <= id < size:
                raise ApiError.refused(name, id, f"token ids from 0 to {size - 1}")

    def _check_bias(self, options: Options) -> None:
        size = self.model.vocab_size
        for token, _ in options.sampling.logit_bias:
            if token >= size:
                raise ApiError.refused("logit_bias", token, f"token ids from 0 to {size - 1}")

    @property
    def _capacity(self) -> int:
        return self.model.slots + self.limits.max_queue

    def _retry_after(self) -> int:
        """Seconds until the queue is probably shorter: the mean time of a request."""
        latency = self.metrics.latency
        mean = latency.sum / latency.count if latency.count else 1.0
        return min(60, max(1, round(mean)))

    @staticmethod
    def _size(job: Job) -> int:
        return max(len(job.texts), len(job.scores))


def check_name(name: str, served: str) -> None:
    """Refuses another model's name.

    Raises:
        ApiError: 404.
    """
    if name != served:
        message = f"the model {name[:100]!r} does not exist; this server has {served!r}"
        raise ApiError(404, message, "model", "model_not_found")


def shutting_down() -> ApiError:
    """The 503 of a server that ends."""
    return ApiError(503, "the server is shutting down", headers={"Connection": "close"})


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Errors of the library become a 400 for a field of the request."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, f"{name}: got {error.got}; expected {error.expected}", name) from None
