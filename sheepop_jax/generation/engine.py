"""Text generation with continuous batching: texts join and leave a running batch between steps.

`Engine` writes texts for many callers, a few tokens per step; `generate` writes a fixed set of
texts as fast as possible, in the same batches. A text depends on its own request alone, so both
write the same.

Shapes are rounded up to a few buckets, so that few programs are compiled. A text longer than the
context of C tokens is written with a sliding window: each time it reaches C tokens, the cache is
prefilled again with the last C // 2, whose positions restart at 0; penalties then count these. A
model with a sliding window of its own and rotary positions needs no restart: it writes on, in a
cache of that size.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sheepop_jax.errors import InputError
from sheepop_jax.generation.batch import Batch, Program, RunningText, empty_cache
from sheepop_jax.generation.decode import Joining, cast_matrices, prefill, prefill_chunk
from sheepop_jax.generation.requests import (
    ALL,
    Completion,
    GenerationConfig,
    Output,
    Request,
    StopReason,
    new_token_limit,
)
from sheepop_jax.model.kv_cache import Cache
from sheepop_jax.model.transformer import Transformer

NO_END = -1  # end-of-text id that matches no token
SMALLEST_BUCKET = 16
LARGEST_CHUNK = 128  # prompt tokens prefilled between two decoding steps of the other texts
SHORTEST_CACHE = 192  # attention reads every slot: 256 in place of 144 cost 11% of a step of 8 rows
STEP_SECONDS = 0.1  # aim of one `Engine.step`: text appears smoothly, and new texts wait little
GROUP = 8  # short prompts prefilled together
SHRINK_AFTER = 4  # steps with rows that a smaller batch would not have


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine.

    Attributes:
        context: maximum positions per text; None for `model.max_seq_len`.
        slots: texts written at the same time.
        chunk: maximum tokens of each text per step.
        slide: whether a text may exceed the context, with a sliding window.
    """

    context: int | None = None
    slots: int = 8
    chunk: int = 8
    slide: bool = True


class Engine:
    """Writes the texts of many requests in one running batch. Not thread-safe.

    Each `step` starts waiting texts while rows are free, prefilling long prompts in chunks so that
    the other texts go on, and then writes a few tokens to each text. The batch has a few possible
    shapes: 1, 8, 32 or 128 rows, up to `slots`, and caches of 192, 768 or all tokens of the
    context. It takes the smallest that its texts need.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        end_of_text: int | Sequence[int],
        config: EngineConfig = EngineConfig(),
    ) -> None:
        """Prepares the parameters; compiles no step before the first one.

        Args:
            model: the model; activations and cache use its `dtype`.
            params: model parameters, fp32 or quantized.
            end_of_text: token ids that end a text, the first of which starts an empty prompt;
                `NO_END` for none.
            config: settings.
        """
        self.config = config
        self.context = model.config.max_seq_len if config.context is None else config.context
        ends = (end_of_text,) if isinstance(end_of_text, int) else tuple(end_of_text)
        # Bound to their devices, as all that is computed from them: otherwise programs would be
        # compiled twice, for arrays that are bound and for arrays that are not.
        bound = jax.tree.map(lambda p: jax.device_put(p, p.sharding), compute_params(model, params))
        self._program = Program(
            model,
            bound,
            ends,
            ALL,
            config.chunk,
            self.context + config.chunk,
        )
        longest = min(self.context, model.config.sliding_window or self.context)
        chunk = min(LARGEST_CHUNK, _round_up(longest, SMALLEST_BUCKET))
        full = _round_up(longest, chunk)
        shorter = [n for n in (SHORTEST_CACHE, 4 * SHORTEST_CACHE) if 2 * n <= full]
        self._lengths = [*shorter, full]
        self._rows = [*(n for n in (1, 8, 32, 128) if n < config.slots), config.slots]
        self._prompt = _Prompt(self._program, full, chunk, min(GROUP, config.slots))
        self._batch: Batch | None = None
        self._waiting: deque[RunningText] = deque()
        self._finished: list[Output] = []
        self._next_id = 0
        self._oversized = 0  # steps in a batch that is too large
        self._step_seconds = 0.0

    @property
    def num_active(self) -> int:
        """Texts that are being decoded."""
        return len(self._batch.active()) if self._batch else 0

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a row or are being prefilled."""
        return len(self._waiting) + (self._prompt.text is not None)

    def add(self, request: Request) -> int:
        """Queues a request and returns its id.

        Raises:
            InputError: the prompt or its new tokens exceed the context, or a token id is outside
                the vocabulary.
        """
        ends, slide = self._program.ends, self.config.slide
        text = new_text(self._program.model, request, ends, self.context, slide)
        text.id, self._next_id = self._next_id, self._next_id + 1
        if text.room:
            self._waiting.append(text)
        else:
            self._finished.append(Output(text.id, [], [], "length"))
        return text.id

    def cancel(self, id: int) -> None:
        """Ends a text; its row is free in the next step. An unknown id is ignored."""
        self._waiting = deque(text for text in self._waiting if text.id != id)
        if self._prompt.text is not None and self._prompt.text.id == id:
            self._prompt.text = None
        if self._batch:
            texts = self._batch.texts
            self._batch.texts = [None if text and text.id == id else text for text in texts]

    def step(self) -> list[Output]:
        """Starts waiting texts, writes a few tokens to each text, and returns what is new.

        Raises:
            InputError: the model's logits are not finite.
        """
        finished, self._finished = self._finished, []
        self._start_waiting()
        if self._batch is None or not self.num_active:
            return finished
        batch = self._shrunk(self._batch)
        steps = self.config.chunk
        if any(len(text.tokens) == text.prompt_length for text in batch.active()):
            steps = 1  # the first token of a text appears at once
        elif self._step_seconds:
            steps = max(1, min(steps, round(STEP_SECONDS / self._step_seconds)))
        begin = time.perf_counter()
        outputs, full, count = batch.advance(steps, self._prompt.idle)
        self._step_seconds = (time.perf_counter() - begin) / count
        for text in reversed(full):
            text.slide()
            self._waiting.appendleft(text)
        return finished + outputs

    def warm_up(self) -> None:
        """Compiles every program that requests can need, so that none waits for it later."""
        self._prompt.warm_up()
        for rows in self._rows:
            for length in self._lengths:
                batch = Batch.empty(self._program, rows, length)
                batch.advance(0, self._prompt.idle)
                batch.take(0, self._prompt.slots)

    def _start_waiting(self) -> None:
        """Prefills waiting texts; while others are decoded, at most one large chunk of tokens."""
        budget = self._prompt.chunk
        while self._prompt.text or (self._waiting and self.num_active < self.config.slots):
            group = [] if self._prompt.text else self._short_prompts()
            if len(group) > 1:
                if budget <= 0 and self.num_active:
                    return
                caches = self._prompt.run_group(group)
                for text in group:
                    self._waiting.remove(text)
                    self._fitting(text).join(text, next(caches))
                budget -= self._prompt.chunk
                continue
            text = self._prompt.text or self._prompt.begin(self._waiting.popleft())
            while self._prompt.chunks:
                if budget <= 0 and self.num_active:
                    return
                budget -= self._prompt.run()
            self._prompt.text = None
            self._fitting(text).join(text, self._prompt.cache)
            budget -= 1

    def _short_prompts(self) -> list[RunningText]:
        """The next waiting texts that one small chunk holds, as many as there are free rows."""
        found: list[RunningText] = []
        for text in self._waiting:
            full = len(found) == min(self._prompt.group, self.config.slots - self.num_active)
            if full or len(text.cached) > SMALLEST_BUCKET:
                break
            found.append(text)
        return found

    def _fitting(self, text: RunningText) -> Batch:
        """A batch with room for one more text, and with the texts of the old one."""
        old = self._batch
        texts = [*(old.active() if old else []), text]
        rows = next(n for n in self._rows if n >= len(texts))
        longest = max(min(text.end - text.window, text.context) for text in texts)
        length = next((n for n in self._lengths if n >= longest), self._lengths[-1])
        if old and len(texts) > 1:  # not smaller while texts are in it
            rows, length = max(rows, len(old.texts)), max(length, old.slots)
        slots = min(length, self._prompt.slots)
        if old and (len(old.texts), old.slots) == (rows, slots):
            return old
        return self._moved(rows, length)

    def _shrunk(self, batch: Batch) -> Batch:
        """The batch, or one of fewer rows if these have sufficed for several steps."""
        rows = next(n for n in self._rows if n >= self.num_active)
        oversized = rows < len(batch.texts) and not self.num_waiting
        self._oversized = self._oversized + 1 if oversized else 0
        if self._oversized <= SHRINK_AFTER:
            return batch
        self._oversized = 0
        return self._moved(rows, batch.slots)

    def _moved(self, rows: int, length: int) -> Batch:
        """A batch of another shape, with the texts of the old one."""
        old, self._batch = self._batch, Batch.empty(self._program, rows, length)
        for row, text in enumerate(old.texts if old else []):
            if old and text:
                self._batch.join(text, old.take(row, self._prompt.slots))
        return self._batch


class _Prompt:
    """The text that is being prefilled, and the cache of one row that all texts use in turn.

    Attributes:
        chunk: tokens of a large chunk; a small one has `SMALLEST_BUCKET`.
        group: most short prompts that are prefilled together.
        slots: slots of the cache.
        text: the text; None if there is none.
        chunks: tokens [1, T] that are not in the cache yet.
    """

    def __init__(self, program: Program, length: int, chunk: int, group: int) -> None:
        self.chunk, self.group, self._program = chunk, group, program
        self.text: RunningText | None = None
        self.chunks: list[np.ndarray] = []
        self._keys, self._values = empty_cache(program, 1, length)
        self.slots = self._keys[0].shape[1]
        self._index = self._pad = 0

    @property
    def cache(self) -> Cache:
        """The cache of the tokens so far."""
        start_1 = np.array([self._pad], np.int32)
        return Cache(self._keys, self._values, np.int32(self._index), start_1)

    @property
    def idle(self) -> Joining:
        """A `Joining` that adds nothing."""
        return Joining(self.cache, np.int32(0), np.int32(0))

    def begin(self, text: RunningText) -> RunningText:
        """Splits a text into chunks of two sizes, left-padded; the last token is no part of it."""
        prompt, sizes = text.cached, list[int]()
        while (left := len(prompt) - sum(sizes)) > 0:
            sizes.append(self.chunk if 2 * left > self.chunk else SMALLEST_BUCKET)
        padded = np.zeros((1, sum(sizes)), np.int32)
        self._index, self._pad = 0, padded.shape[1] - len(prompt)
        padded[0, self._pad :] = prompt
        self.chunks = np.split(padded, np.cumsum(sizes)[:-1], axis=1) if sizes else []
        self.text = text
        return text

    def run(self) -> int:
        """Prefills the next chunk and returns its number of tokens."""
        tokens_1T = self.chunks.pop(0)
        cache = prefill_chunk(
            self._program.params, tokens_1T, self.cache, model=self._program.model
        )
        self._keys, self._values = cache.keys, cache.values
        self._index += tokens_1T.shape[1]
        return tokens_1T.shape[1]

    def run_group(self, texts: Sequence[RunningText]) -> Iterator[Cache]:
        """Prefills texts of at most one small chunk together; the cache of each."""
        shape = self.group, self.group
        batch = prefilled_batch(self._program, texts, shape, SMALLEST_BUCKET, SMALLEST_BUCKET)
        return (batch.take(row, self.slots) for row in range(len(texts)))

    def warm_up(self) -> None:
        """Compiles the programs of both sizes, and that of a group."""
        for size in (SMALLEST_BUCKET, self.chunk):
            self._index, self.chunks = 0, [np.zeros((1, size), np.int32)]
            self.run()
        if self.group > 1:
            text = RunningText(Request((0,)), [0, 0], 3, 3)
            for _ in self.run_group([text]):
                pass


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    end_of_text: int | Sequence[int],
    config: GenerationConfig,
) -> list[Completion]:
    """Continues each prompt `config.num_samples` times.

    Args:
        model: the model; activations and cache use its `dtype`, and matrices are cast to it once.
        params: model parameters, fp32 or quantized.
        prompts: token ids; an empty prompt starts from end-of-text.
        end_of_text: token ids that end a row, the first of which starts an empty prompt; `NO_END`
            for none.
        config: sampling settings, number of new tokens and of samples.

    Returns:
        P · num_samples completions, prompt-major.

    Raises:
        InputError: a prompt or its new tokens exceed the context, a token id is outside the
            vocabulary, or the model's logits are not finite.
    """
    texts, program, slots = plan_texts(model, params, prompts, end_of_text, config)
    reasons: dict[int, StopReason] = {text.id: "length" for text in texts}
    waiting, distinct = [text for text in texts if text.room], len(prompts)
    while waiting:
        batch = prefilled_batch(program, waiting, (distinct, len(texts)), slots)
        waiting, distinct = [], len(texts)
        while batch.active():
            outputs, full, _ = batch.advance(program.size, None)
            reasons |= {output.id: output.stop_reason for output in outputs if output.stop_reason}
            waiting += full
        for text in waiting:
            text.slide()
    return [Completion(text.tokens[text.prompt_length :], reasons[text.id]) for text in texts]


def plan_texts(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    end_of_text: int | Sequence[int],
    config: GenerationConfig,
) -> tuple[list[RunningText], Program, int]:
    """Returns the texts of `generate`, the program that writes them, and the slots of its cache."""
    context = model.config.max_seq_len if config.context is None else config.context
    ends = (end_of_text,) if isinstance(end_of_text, int) else tuple(end_of_text)
    new, seed, samples = config.max_new_tokens, config.seed, range(config.num_samples)
    texts = []
    for ids in prompts:
        for sample in samples:
            request = Request(tuple(ids), config.sampling, new, seed, sample)
            texts.append(new_text(model, request, ends, context, config.slide))
            texts[-1].id = len(texts) - 1
    longest = max((len(text.tokens) for text in texts), default=1)
    most = max((text.room for text in texts), default=0) or 1
    slots = bucket(longest, context) + bucket(most, context)
    if any(text.end > text.context for text in texts):  # their windows slide
        most, slots = max(most, context - context // 2), max(slots, bucket(context, context))
    size = bucket(most, max(most, context))
    params = compute_params(model, params)
    return texts, Program(model, params, ends, config.sampling.kind, size, context + size), slots


def new_text(
    model: Transformer, request: Request, ends: Sequence[int], context: int, slide: bool
) -> RunningText:
    """Returns the text that a request starts with.

    Raises:
        InputError: the prompt or its new tokens exceed the context, or a token id is outside the
            vocabulary.
    """
    tokens = list(request.prompt) or [ends[0]]
    learned = model.config.position == "learned"
    limit = new_token_limit(
        len(tokens), request.max_new_tokens, context, slide=slide, learned=learned
    )
    biased = [token for token, _ in request.sampling.logit_bias]
    for name, ids in (("prompt", tokens), ("logit_bias", biased)):
        if ids and not 0 <= min(ids) <= max(ids) < model.vocab_size:
            rule = f"token ids from 0 to {model.vocab_size - 1}"
            raise InputError(name, [min(ids), max(ids)], rule)
    end = len(tokens) + limit
    if slide and model.config.sliding_window and model.config.position == "rope":
        context = max(context, end)
    return RunningText(request, tokens, end, context)


def compute_params(model: Transformer, params: Any) -> Any:
    """The parameters on a device, with matrices in the model's dtype."""
    if any(p.ndim > 1 and p.dtype not in (model.dtype, jnp.int8) for p in jax.tree.leaves(params)):
        params = cast_matrices(params, model.dtype)
    # Arrays of several processes cannot be put: they stay where they are.
    return jax.tree.map(lambda p: p if isinstance(p, jax.Array) else jax.device_put(p), params)


def bucket(length: int, context: int) -> int:
    """Rounds a length up to a power of two, at least 16 and at most the context."""
    power = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return max(length, min(power, context))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def prefilled_batch(
    program: Program,
    texts: Sequence[RunningText],
    shape: tuple[int, int],
    slots: int,
    width: int | None = None,
) -> Batch:
    """Prefills texts together.

    Args:
        program: settings of the batch.
        texts: the texts.
        shape: number of distinct prompts and of rows; further ones are empty.
        slots: tokens per row.
        width: tokens per prompt, padding included; None for the bucket of the longest.
    """
    prompts, rows = shape
    cached, source_B = [tuple(text.cached) for text in texts], None
    if prompts < rows:
        distinct = list(dict.fromkeys(cached))
        source_B = np.zeros(rows, np.int32)
        source_B[: len(texts)] = [distinct.index(tokens) for tokens in cached]
        cached = distinct
    longest = max(map(len, cached))
    if width is None:
        width = min(bucket(longest, slots), slots) if longest else 0
    tokens_PT, start_P = np.zeros((prompts, width), np.int32), np.full(prompts, width, np.int32)
    for row, tokens in enumerate(cached):
        start_P[row] = width - len(tokens)
        tokens_PT[row, start_P[row] :] = tokens
    cache = prefill(program.params, tokens_PT, start_P, source_B, model=program.model, slots=slots)
    start_B = start_P if source_B is None else start_P[source_B]
    unused = [None] * (rows - len(texts))
    return Batch(program, cache.keys, cache.values, [*texts, *unused], width, start_B)
