"""The token stream of one split: layout and random access.

Layout: end-of-text, then each document's tokens followed by end-of-text. Every token after the
first therefore has context; a document's first token is predicted from end-of-text.

Conversations have no token in between. Each token has a mark (`data.marks`): whether the loss
counts it, and whether it begins a conversation.

With a BOS of its own (`Tokenizer.document_bos`), a model reads it first: BOS, then each document's
tokens, end-of-text and BOS, but no BOS at the end. BOS is given, never predicted.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from sheepop_jax.data.marks import BEGINS, COUNTED
from sheepop_jax.data.token_file import TokenFile
from sheepop_jax.data.tokenizer import Tokenizer

_BATCH_CHARS = 2**20  # characters encoded at a time
_SCAN_TOKENS = 2**22


class TokenStream:
    """The tokens of one split.

    Attributes:
        num_bytes: UTF-8 bytes of the documents.
        num_documents: number of documents.
        num_targets: number of tokens to predict: all but the first, and every BOS; of
            conversations, those that the loss counts.
        has_marks: whether it holds conversations.
    """

    num_targets: int

    def __init__(
        self,
        parts: Sequence[np.ndarray | TokenFile],
        num_bytes: int,
        num_documents: int,
        has_bos: bool = False,
    ):
        """A stream over the tokens of `parts`, which begin with end-of-text.

        With `has_bos`, each document begins with BOS, and the stream without that end-of-text.
        """
        self._parts = list(parts)
        self._marks: list[np.ndarray | TokenFile] = []
        self._starts = np.cumsum([-int(has_bos)] + [len(part) for part in parts])
        self.num_bytes = num_bytes
        self.num_documents = num_documents
        self.num_targets = len(self) - 1 - (num_documents - 1 if has_bos else 0)

    @classmethod
    def from_array(cls, tokens: np.ndarray, num_bytes: int, num_documents: int) -> "TokenStream":
        """A stream over tokens [N] in memory."""
        return cls([tokens], num_bytes, num_documents)

    @classmethod
    def of_conversations(
        cls,
        parts: Sequence[np.ndarray | TokenFile],
        marks: Sequence[np.ndarray | TokenFile],
        num_bytes: int,
        num_documents: int,
        num_counted: int,
    ) -> "TokenStream":
        """A stream over the tokens of conversations, and a mark of each in equal parts.

        `num_bytes` are those of the text that the loss counts, in `num_counted` tokens.
        """
        stream = cls(parts, num_bytes, num_documents)
        stream._marks, stream.num_targets = list(marks), num_counted
        return stream

    @property
    def has_marks(self) -> bool:
        return bool(self._marks)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def weights(self, start: int, stop: int) -> np.ndarray:
        """The weights float32 of tokens [start, stop) as targets."""
        if not self._marks:
            return np.ones(stop - start, np.float32)
        return (self._read(self._marks, start, stop) & COUNTED != 0).astype(np.float32)

    def begins(self, start: int, stop: int) -> np.ndarray:
        """Whether each of tokens [start, stop) is the first of a conversation."""
        return self._read(self._marks, start, stop) & BEGINS != 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copies tokens [start, stop) as int32.

        Raises:
            IndexError: the range is not within the stream.
        """
        return self._read(self._parts, start, stop)

    def _read(self, parts: list[np.ndarray | TokenFile], start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of a stream of {len(self)}")
        out = np.empty(stop - start, np.int32)
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            first = int(self._starts[index])
            end = min(stop, int(self._starts[index + 1]))
            out[position - start : end - start] = parts[index][position - first : end - first]
            position, index = end, index + 1
        return out

    def positions_of(self, token: int) -> np.ndarray:
        """Positions [N] int64 of a token: of end-of-text or BOS, the borders of documents."""
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(self), _SCAN_TOKENS):
            tokens = self.read(start, min(start + _SCAN_TOKENS, len(self)))
            found.append(start + np.flatnonzero(tokens == token))
        return np.concatenate(found)

    def conversation_starts(self) -> np.ndarray:
        """Positions [N] int64 of the first token of each conversation."""
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(self), _SCAN_TOKENS):
            begins = self.begins(start, min(start + _SCAN_TOKENS, len(self)))
            found.append(start + np.flatnonzero(begins))
        return np.concatenate(found)


class Piece(NamedTuple):
    """A piece of a document to encode."""

    text: str
    is_val: bool
    begins: bool  # whether it starts a document
    context: str = ""  # the text before it that affects its ids (`Tokenizer.pieces`)


class EncodedBatch(NamedTuple):
    """Pieces in order, and their tokens."""

    pieces: list[Piece]
    sides: list[np.ndarray]  # training and validation tokens [n] int32
    restored: list[bool]  # of each side: whether decoding restores its text


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Iterator[EncodedBatch]:
    """Encodes pieces, in batches.

    Each document is preceded by end-of-text, and by BOS if there is one; the caller appends the
    final end-of-text of a stream. Encoding a batch on all cores overlaps with the post-processing
    of the previous one.
    """

    def encode(batch: list[Piece]) -> EncodedBatch:
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([nothing], [nothing])
        restored = [True, True]
        encoded = tokenizer.encode_pieces([(piece.context, piece.text) for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.begins:
                sides[piece.is_val].append(begin)
            sides[piece.is_val].append(np.fromiter(ids, np.int32, len(ids)))
            restored[piece.is_val] = restored[piece.is_val] and tokenizer.restores(piece.text, ids)
        return EncodedBatch(batch, [np.concatenate(side) for side in sides], restored)

    bos = [] if tokenizer.document_bos is None else [tokenizer.document_bos]
    nothing, begin = np.zeros(0, np.int32), np.array([tokenizer.end_of_text, *bos], np.int32)
    queue: list[Future[EncodedBatch]] = []
    with ThreadPoolExecutor(2) as threads:
        for batch in _batches(pieces):
            queue.append(threads.submit(encode, batch))
            if len(queue) > 2:
                yield queue.pop(0).result()
        for future in queue:
            yield future.result()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encode_text(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Encodes texts, one document each, to the parts [N] int32 of a `TokenStream`."""
    pieces = (
        Piece(piece, False, index == 0, context)
        for text in texts
        for index, (context, piece) in enumerate(tokenizer.pieces([text]))
    )
    parts = [batch.sides[0] for batch in encode_pieces(tokenizer, pieces)]
    return np.concatenate([*parts, np.array([tokenizer.end_of_text], np.int32)])
