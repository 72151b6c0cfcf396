"""The token stream of one split: its layout, its memory-mapped files, and their writer.

The stream is end-of-text, then each document's tokens and end-of-text. So every token after the
first is predicted from something, a document's first token from end-of-text.
"""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sheepop_jax.data.progress import Progress
from sheepop_jax.data.tokenizer import Tokenizer, split_text
from sheepop_jax.errors import InputError

_SHARD_TOKENS = 2**26
_BATCH_CHARS = 2**20  # characters encoded at a time


class TokenStream:
    """The tokens of one split, read without loading them.

    Attributes:
        num_bytes: UTF-8 bytes of the documents.
        num_documents: how many documents there are.
    """

    def __init__(
        self, parts: Sequence["np.ndarray | TokenFile"], num_bytes: int, num_documents: int
    ):
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


class TokenFile:
    """One memory-mapped token file, which refuses to be read once the file has shrunk."""

    def __init__(self, path: Path, dtype: str):
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._tokens = np.frombuffer(self._map, dtype)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, span: slice) -> np.ndarray:
        # size() asks the file. Reading mapped pages beyond its end would kill the process (SIGBUS).
        if self._map.size() != self._tokens.nbytes:
            raise damaged(self._path, f"{self._map.size()} bytes", f"{self._tokens.nbytes} bytes")
        return self._tokens[span]


def encode_text(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Tokens [N] int32 of the texts, one document each, laid out as a split's stream."""
    parts: list[np.ndarray] = []
    with Progress("encoding", 0) as progress:
        encoder = _Encoder(tokenizer, parts.append, progress)
        for text in texts:
            encoder.add(text, "text")
        encoder.flush()
    return np.concatenate(parts)


class _Encoder:
    """Lays documents out as a stream and hands its tokens on, a bounded batch at a time."""

    def __init__(
        self, tokenizer: Tokenizer, sink: Callable[[np.ndarray], None], progress: Progress
    ):
        self._tokenizer, self._sink, self._progress = tokenizer, sink, progress
        self._pieces: list[str] = []
        self._last: list[bool] = []  # whether the piece ends its document
        self._chars = 0
        sink(np.array([tokenizer.end_of_text], np.int32))

    def add(self, text: str, name: str) -> None:
        self._tokenizer.check(text, name)  # here, where the position is the document's
        pieces = list(split_text(text))
        for index, piece in enumerate(pieces):
            self._pieces.append(piece)
            self._last.append(index == len(pieces) - 1)
            self._chars += len(piece)
            if self._chars >= _BATCH_CHARS:
                self.flush()
            self._progress.update(len(piece))

    def flush(self) -> None:
        tokens: list[int] = []
        encoded = self._tokenizer.encode_batch(self._pieces)
        for ids, last in zip(encoded, self._last, strict=True):
            tokens += ids
            if last:
                tokens.append(self._tokenizer.end_of_text)
        if tokens:
            self._sink(np.array(tokens, np.int32))
        self._pieces, self._last, self._chars = [], [], 0


class SplitWriter:
    """Encodes the documents of one split into files NAME-00000.bin and on."""

    def __init__(self, directory: Path, name: str, tokenizer: Tokenizer, progress: Progress):
        self.name = name
        self.dtype = "<u2" if tokenizer.vocab_size < 2**16 else "<u4"
        self._directory, self._vocab_size = directory, tokenizer.vocab_size
        self._files: list[dict[str, Any]] = []
        self._documents = self._bytes = 0
        self._encoder = _Encoder(tokenizer, self._append, progress)

    def add(self, name: str, text: str, num_bytes: int) -> None:
        self._encoder.add(text, name)
        self._documents += 1
        self._bytes += num_bytes

    def close(self) -> dict[str, Any]:
        """Writes what is left and gives the split's part of the manifest."""
        self._encoder.flush()
        for entry in self._files:
            path = self._directory / entry["file"]
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            entry["sha256"] = sha256_of(path)
        return {
            "tokens": sum(entry["tokens"] for entry in self._files),
            "bytes": self._bytes,
            "documents": self._documents,
            "files": self._files,
        }

    def _append(self, tokens: np.ndarray) -> None:
        # An id beyond the vocabulary would not fail later: the embedding would give NaN.
        if tokens.max() >= self._vocab_size:
            expected = f"ids below its vocabulary size {self._vocab_size}"
            raise InputError("data.tokenizer", f"id {tokens.max()}", expected)
        while len(tokens):
            if not self._files or self._files[-1]["tokens"] == _SHARD_TOKENS:
                name = f"{self.name}-{len(self._files):05d}.bin"
                self._files.append({"file": name, "tokens": 0})
            entry = self._files[-1]
            fitting = tokens[: _SHARD_TOKENS - entry["tokens"]]
            with (self._directory / entry["file"]).open("ab") as file:
                file.write(fitting.astype(self.dtype).tobytes())
            entry["tokens"] += len(fitting)
            tokens = tokens[len(fitting) :]


def damaged(path: Path, got: object, expected: str) -> InputError:
    directory = path if path.is_dir() else path.parent
    hint = f"deleting {directory}; it is then made again"
    return InputError(str(path), str(got), f"{expected}, as its manifest says", hint)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
