"""The token stream of one split: its layout, and its files, read without loading them.

The stream is end-of-text, then each document's tokens and end-of-text. So every token after the
first is predicted from something, a document's first token from end-of-text.
"""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sheepop_jax.data.tokenizer import Tokenizer, split_text
from sheepop_jax.errors import InputError

_BATCH_CHARS = 2**20  # characters encoded at a time
_SCAN_TOKENS = 2**22


class TokenFile:
    """One token file, read by position; memory-mapping it would let memory grow with its size.

    A file that has shrunk since it was opened is refused, where a mapping would kill the process.
    """

    def __init__(self, path: Path, dtype: str):
        self._path, self._dtype = path, np.dtype(dtype)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._tokens = os.fstat(self._file).st_size // self._dtype.itemsize

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, span: slice) -> np.ndarray:
        size = self._dtype.itemsize
        wanted = (span.stop - span.start) * size
        found = b""
        while len(found) < wanted:  # one read gives 2 GiB at most
            start = span.start * size + len(found)
            block = os.pread(self._file, wanted - len(found), start)
            if not block:
                left = os.fstat(self._file).st_size
                raise damaged(self._path, f"{left} bytes", f"{self._tokens * size} bytes")
            found = found + block if found else block
        return np.frombuffer(found, self._dtype)


class TokenStream:
    """The tokens of one split.

    Attributes:
        num_bytes: UTF-8 bytes of the documents.
        num_documents: how many documents there are.
    """

    def __init__(self, parts: Sequence[np.ndarray | TokenFile], num_bytes: int, num_documents: int):
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        self.num_bytes = num_bytes
        self.num_documents = num_documents

    @classmethod
    def from_array(cls, tokens: np.ndarray, num_bytes: int, num_documents: int) -> "TokenStream":
        """A stream over tokens [N] in memory."""
        return cls([tokens], num_bytes, num_documents)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [stop - start] int32, a copy; the range must lie within the stream."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of a stream of {len(self)}")
        out = np.empty(stop - start, np.int32)
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            first = int(self._starts[index])
            end = min(stop, int(self._starts[index + 1]))
            out[position - start : end - start] = self._parts[index][position - first : end - first]
            position, index = end, index + 1
        return out

    def document_starts(self, end_of_text: int) -> np.ndarray:
        """Positions [documents + 1] int64 of every end-of-text: where documents begin and end."""
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(self), _SCAN_TOKENS):
            tokens = self.read(start, min(start + _SCAN_TOKENS, len(self)))
            found.append(start + np.flatnonzero(tokens == end_of_text))
        return np.concatenate(found)


class Piece(NamedTuple):
    """A part of a document on its way to tokens."""

    text: str
    held_out: bool
    begins: bool  # whether a document begins with it


def encode_pieces(
    tokenizer: Tokenizer, pieces: Iterable[Piece]
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Batches of pieces, each with the tokens [n] int32 of either side, in order.

    An end-of-text stands before each document; the one at the end of a stream is left to the
    caller. While one batch is encoded on all cores, the tokens of the last are put in order.
    """

    def encode(batch: list[Piece]) -> tuple[list[Piece], list[np.ndarray]]:
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([nothing], [nothing])
        encoded = tokenizer.encode_batch([piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.begins:
                sides[piece.held_out].append(end_of_text)
            sides[piece.held_out].append(np.fromiter(ids, np.int32, len(ids)))
        return batch, [np.concatenate(side) for side in sides]

    nothing, end_of_text = np.zeros(0, np.int32), np.array([tokenizer.end_of_text], np.int32)
    queue: list[Future[tuple[list[Piece], list[np.ndarray]]]] = []
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
    """Tokens [N] int32 of the texts, one document each, laid out as a split's stream."""
    pieces = (
        Piece(piece, False, index == 0)
        for text in texts
        for index, piece in enumerate(split_text([text]))
    )
    parts = [tokens for _, (tokens, _) in encode_pieces(tokenizer, pieces)]
    return np.concatenate([*parts, np.array([tokenizer.end_of_text], np.int32)])


def damaged(path: Path, got: object, expected: str) -> InputError:
    directory = path if path.is_dir() else path.parent
    hint = f"deleting {directory}; it is then made again"
    return InputError(str(path), str(got), f"{expected}, as its manifest says", hint)
