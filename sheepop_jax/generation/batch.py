"""A batch of texts that are decoded together: their rows, their cache, and what each step adds.

Alphabet: as in `generation.decode`.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from sheepop_jax.errors import InputError
from sheepop_jax.generation.decode import Joining, Rows, SamplerState, advance, take_row
from sheepop_jax.generation.requests import (
    Kind,
    Output,
    Request,
    SamplingConfig,
    StopReason,
    TokenLogprob,
)
from sheepop_jax.generation.sampling import SamplingArrays
from sheepop_jax.model.kv_cache import Cache
from sheepop_jax.model.transformer import Transformer

_UNUSED = Request((), SamplingConfig(temperature=0))


@dataclass
class RunningText:
    """A request and what is written of it so far.

    Attributes:
        request: its settings.
        tokens: prompt and text.
        end: length at which the text ends.
        context: maximum positions.
        id: number of the request.
        window: place in `tokens` where the model's context begins.
    """

    request: Request
    tokens: list[int]
    end: int
    context: int
    id: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self.hash = zlib.crc32(np.array(self.tokens, "<u4").tobytes())

    @property
    def room(self) -> int:
        """New tokens until the text ends or fills its context."""
        return min(self.end, self.window + self.context) - len(self.tokens)

    @property
    def cached(self) -> list[int]:
        """The tokens of the context that must be in the cache: all but the newest."""
        return self.tokens[self.window : -1]

    def slide(self) -> None:
        """Moves the window of a full context to its second half."""
        self.window = len(self.tokens) - self.context // 2


@dataclass(frozen=True)
class Program:
    """What `advance` is compiled for, besides the batch's shape.

    Attributes:
        model: the model.
        params: its parameters, matrices in its dtype.
        ends: token ids that end a text; -1 is no token.
        kind: sampling operations.
        size: maximum tokens per step.
        history: H, tokens that penalties count.
    """

    model: Transformer
    params: Any
    ends: tuple[int, ...]
    kind: Kind
    size: int
    history: int

    @property
    def static(self) -> dict[str, Any]:
        """The static arguments of `advance`."""
        return {"model": self.model, "kind": self.kind, "size": self.size}


@dataclass
class Batch:
    """Texts in rows, and their cache.

    The cache's numbers are kept on the host, which knows them without asking the device.

    Attributes:
        program: settings of the compiled function.
        keys, values: see `Cache`.
        texts: the text of each row; None for an unused row.
        index, start_B: see `Cache`.
    """

    program: Program
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    texts: list[RunningText | None]
    index: int = 0
    start_B: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    _members: list[int | None] | None = None
    _columns: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, program: Program, rows: int, length: int) -> "Batch":
        """A batch without texts, with a cache for `length` tokens per row."""
        keys, values = empty_cache(program, rows, length)
        return cls(program, keys, values, [None] * rows, 0, np.zeros(rows, np.int32))

    @property
    def cache(self) -> Cache:
        """Keys and values of all rows."""
        return Cache(self.keys, self.values, np.int32(self.index), self.start_B)

    @property
    def slots(self) -> int:
        """Slots of the cache: the length, or the model's window if that is less."""
        return int(self.keys[0].shape[1])

    def active(self) -> list[RunningText]:
        """The texts in the batch."""
        return [text for text in self.texts if text is not None]

    def join(self, text: RunningText, cache: Cache) -> None:
        """Puts a text with its cache of one row into an unused row."""
        row = self.texts.index(None)
        self.texts[row] = text
        self._run(0, Joining(cache, np.int32(row), np.int32(1)))
        self.start_B[row] = self.index - len(text.cached)

    def take(self, row: int, slots: int) -> Cache:
        """Copies the cache of a row, to join another batch."""
        taken = take_row(self.cache, np.int32(row), slots=slots)
        # Numbers from the host, as those of a prefilled text: `advance` is compiled for both.
        index = np.int32(self.index - self.start_B[row])
        return Cache(taken.keys, taken.values, index, np.zeros(1, np.int32))

    def advance(
        self, steps: int, idle: Joining | None
    ) -> tuple[list[Output], list[RunningText], int]:
        """Writes up to `steps` tokens to each text and frees the rows of those that end.

        Args:
            steps: at most `program.size`.
            idle: a `Joining` that adds nothing, if texts ever join this batch.

        Returns:
            What is new, the texts whose context is full, and the number of steps done.

        Raises:
            InputError: the model's logits are not finite.
        """
        state = self._run(steps, idle)
        tokens_BN, length_B, count = jax.device_get((state.tokens_BN, state.length_B, state.count))
        logprobs: Any = None
        if any(text.request.logprobs is not None for text in self.active()):
            logprobs = jax.device_get(state.logprobs)
        self._renumber(int(count))
        outputs, full = [], []
        for row, text in enumerate(self.texts):
            if text is None:
                continue
            new = tokens_BN[row, : length_B[row]].tolist()
            room = text.room
            text.tokens += new
            reason: StopReason | None = None
            seen = len(new)
            if len(new) < min(room, count):  # rows go on unless they end
                reason, seen = "end_of_text", seen + 1
            elif len(text.tokens) == text.end:
                reason = "length"
            if max(tokens_BN[row, :seen], default=0) >= self.program.model.vocab_size:
                raise InputError("parameters", "NaN logits", "finite logits", "another `step`")
            found = [] if logprobs is None else _reported(text, row, seen, tokens_BN, logprobs)
            if new or reason:
                outputs.append(Output(text.id, new, found, reason))
            if reason or text.room == 0:
                self.texts[row] = None
            if not reason and text.room == 0:
                full.append(text)
        return outputs, full, int(count)

    def arguments(self, steps: int, joining: Joining | None) -> tuple[Any, ...]:
        """The traced arguments of `advance`."""
        return self.program.params, self.cache, self._rows(), np.int32(steps), joining

    def _run(self, steps: int, joining: Joining | None) -> SamplerState:
        state = advance(*self.arguments(steps, joining), **self.program.static)
        self.keys, self.values = state.cache.keys, state.cache.values
        return state

    def _renumber(self, steps: int) -> None:
        """Follows the cache's numbers over the steps, and keeps them small."""
        index = self.index + steps
        self.index = index % self.slots
        self.start_B = (self.start_B - (index - self.index)).astype(np.int32)

    def _rows(self) -> Rows:
        texts, program = self.texts, self.program
        members = [text.id if text else None for text in texts]
        if members != self._members:
            requests = [text.request if text else _UNUSED for text in texts]
            reported = any(request.logprobs is not None for request in requests)
            configs = [request.sampling for request in requests]
            self._members = members
            self._columns = {
                "seed_B": np.array([request.seed for request in requests], np.uint32),
                "hash_B": np.array([text.hash if text else 0 for text in texts], np.uint32),
                "sample_B": np.array([request.sample for request in requests], np.int32),
                "ends_BE": np.tile(np.array(program.ends, np.int32), (len(texts), 1)),
                "sampling": SamplingArrays.of(configs, program.kind, reported),
            }
        columns = self._columns
        history = program.history if program.kind.adjusted else 0
        text_BH = np.zeros((len(texts), history), np.int32)
        prompt_B, length_B = np.zeros((2, len(texts)), np.int32)
        if history and columns["sampling"].level == 2:
            kept = history - program.size  # room for the tokens of this step
            for row, text in enumerate(texts):
                if text is not None:
                    first = max(text.window, len(text.tokens) - kept)
                    counted = text.tokens[first:]
                    text_BH[row, : len(counted)] = counted
                    prompt_B[row] = max(0, text.prompt_length - first)
                    length_B[row] = len(counted)

        def column(value: Any) -> np.ndarray:
            return np.array([value(text) if text else 0 for text in texts], np.int32)

        return Rows(
            newest_B=column(lambda text: text.tokens[-1]),
            place_B=column(lambda text: len(text.tokens)),
            limit_B=column(lambda text: text.room),
            text_BH=text_BH,
            prompt_B=prompt_B,
            length_B=length_B,
            **columns,
        )


def empty_cache(
    program: Program, rows: int, length: int
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Keys and values of `init_cache`, made on the host: nothing is compiled for it.

    They are placed as the parameters are. Otherwise the first step would be compiled for arrays
    without a device, and the next one again for its outputs, which have one.
    """
    config = program.model.config
    slots = min(length, config.sliding_window or length)
    zeros = np.zeros((rows, slots, config.kv_heads, config.head_width), program.model.dtype)
    sharding = jax.tree.leaves(program.params)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    layers = range(config.num_layers)
    return (
        tuple(jax.device_put(zeros, sharding) for _ in layers),
        tuple(jax.device_put(zeros, sharding) for _ in layers),
    )


def _reported(
    text: RunningText, row: int, seen: int, tokens_BN: np.ndarray, logprobs: Any
) -> list[TokenLogprob]:
    """The log-probabilities of a row's first `seen` tokens, if its request asks for them."""
    if text.request.logprobs is None:
        return []
    found = []
    for n in range(seen):
        ids, values = logprobs.tokens_BK[row, n].tolist(), logprobs.top_BK[row, n].tolist()
        pairs = list(zip(ids, values, strict=True))[: text.request.logprobs]
        top = tuple(pair for pair in pairs if np.isfinite(pair[1]))
        found.append(TokenLogprob(int(tokens_BN[row, n]), float(logprobs.chosen_B[row, n]), top))
    return found
