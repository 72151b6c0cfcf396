"""Encodes the conversations of a corpus store: whole, and none longer than a window."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sheepop_jax.config.data import DataConfig
from sheepop_jax.data.chat import ChatEncoder, Example, Messages
from sheepop_jax.data.marks import COUNTED
from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.data.preprocess.split import Segment
from sheepop_jax.data.sources.conversations import from_json
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError

_BATCH_BYTES = 2**20  # encoded at a time
DROPPED, TRUNCATED, REFUSED = "dropped", "truncated", "refused"
_NOTHING = np.zeros(0, np.int32)


class EncodedSide(NamedTuple):
    """New tokens of the training or the validation split.

    Attributes:
        tokens: [n] int32.
        num_bytes: UTF-8 bytes of the text that the loss counts.
        documents: how many begin in it.
        restored: whether decoding restores the text.
        marks: of each token of conversations (`data.marks`), uint8; None for text.
    """

    tokens: np.ndarray
    num_bytes: int
    documents: int
    restored: bool = True
    marks: np.ndarray | None = None


class EncodedSides(NamedTuple):
    """Some documents of a corpus store.

    Attributes:
        sides: training and validation tokens.
        bytes_read: of the corpus store.
        left_out: conversations that are not encoded, or not whole, by reason.
    """

    sides: list[EncodedSide]
    bytes_read: int
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations as the `data` section says.

    Attributes:
        chat: the encoder.
        limit: tokens of a conversation at most: one more than a window has inputs.
        truncates: whether longer ones lose their oldest turns; they are dropped otherwise.
        skips: whether conversations that the template refuses are left out; else an error.
    """

    chat: ChatEncoder
    limit: int
    truncates: bool
    skips: bool

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer) -> "ConversationEncoder":
        """The encoder for a `data` section and a tokenizer with a chat template."""
        chat = ChatEncoder(tokenizer, config.chat_loss)
        truncates = config.long_conversations == "truncate"
        return cls(chat, config.seq_len + 1, truncates, config.broken_rows == "skip")

    def encode(self, spool: CorpusStore, segments: Iterable[Segment]) -> Iterator[EncodedSides]:
        """Encodes the documents of segments, which are whole.

        Raises:
            InputError: the template refuses a conversation.
        """
        batch: list[Segment] = []
        for segment in segments:
            batch.append(segment)
            if segment.stop - batch[0].start >= _BATCH_BYTES:
                yield self._encode(spool, batch)
                batch = []
        if batch:
            yield self._encode(spool, batch)

    def _encode(self, spool: CorpusStore, batch: list[Segment]) -> EncodedSides:
        texts = ["".join(spool.text(segment.start, segment.stop)) for segment in batch]
        conversations = [from_json(text) for text in texts]
        left_out = Counter[str]()
        sides: list[list[Example]] = [[], []]
        found = self._examples(conversations)
        for segment, messages, example in zip(batch, conversations, found, strict=True):
            if isinstance(example, InputError):
                if not self.skips:
                    got = f"{example.got} ({spool.name(segment.document)})"
                    raise InputError(
                        example.field, got, example.expected, "`data.broken_rows=skip`"
                    ) from None
                left_out[REFUSED] += 1
                continue
            if len(example.ids) > self.limit:
                shorter = self._truncated(messages) if self.truncates else None
                left_out[TRUNCATED if shorter else DROPPED] += 1
                if shorter is None:
                    continue
                example = shorter
            sides[segment.is_val].append(example)
        return EncodedSides(
            [_joined(side) for side in sides],
            sum(segment.stop - segment.start for segment in batch),
            left_out,
        )

    def _examples(self, conversations: Sequence[Messages]) -> list[Example | InputError]:
        try:
            return [*self.chat.examples(conversations)]
        except InputError:
            found: list[Example | InputError] = []
            for messages in conversations:  # which one it is
                try:
                    found += self.chat.examples([messages])
                except InputError as error:
                    found.append(error)
            return found

    def _truncated(self, messages: Messages) -> Example | None:
        """The end of a conversation, from a turn of the user on, after the system messages."""
        first = next(i for i, message in enumerate(messages) if message["role"] != "system")
        system = messages[:first]
        for start in range(first + 1, len(messages)):
            rest = messages[start:]
            if rest[0]["role"] != "user" or all(m["role"] != "assistant" for m in rest):
                continue
            [example] = self._examples([[*system, *rest]])
            if isinstance(example, Example) and len(example.ids) <= self.limit:
                return example
        return None


def _joined(examples: list[Example]) -> EncodedSide:
    return EncodedSide(
        np.concatenate([_NOTHING, *(example.ids for example in examples)]),
        sum(example.num_bytes for example in examples),
        len(examples),
        marks=np.concatenate([np.zeros(0, np.uint8), *(example.marks for example in examples)]),
    )


def count_counted(marks: np.ndarray) -> int:
    """How many tokens with these marks the loss counts."""
    return int(np.count_nonzero(marks & COUNTED))
