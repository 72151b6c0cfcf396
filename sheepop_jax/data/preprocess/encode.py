"""Encodes a corpus store into token shards, in units that are written atomically.

Interrupted work resumes from the first missing unit and produces the same bytes.

    train-00007.bin, validation-00007.bin   token ids of unit 7, little endian
    unit-00007.json                         their counts and SHA-256; written last
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.data.preprocess.split import Split
from sheepop_jax.data.shards import SIDES, dtype_of
from sheepop_jax.data.stream import Piece, encode_pieces
from sheepop_jax.data.tokenizer import CONTEXT_CHARS, Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.files import pending_name, write_atomic
from sheepop_jax.progress import Progress

logger = logging.getLogger(__name__)

_UNIT_BYTES = 2**26  # of text per unit; about 15 s on two cores


class Unit(NamedTuple):
    """Bytes [start, stop) of a corpus store, all from one source."""

    number: int
    source: int
    start: int
    stop: int


def units(spool: CorpusStore, tokenizer: Tokenizer) -> list[Unit]:
    """Splits a corpus store between documents, or within very large ones, by content alone.

    A split within a document leaves its ids as they are.
    """
    found: list[Unit] = []
    ends = spool.documents["end"]
    for source in range(len(spool.sources)):
        among = np.flatnonzero(spool.documents["source"] == source)
        start, stop = int(spool.starts[among[0]]), int(ends[among[-1]])
        while start < stop:
            border = stop
            if stop - start > _UNIT_BYTES:
                target = start + _UNIT_BYTES
                border = int(ends[np.searchsorted(ends, target)])  # first document end from target
                if border - start > 2 * _UNIT_BYTES:
                    border = min(border, spool.cut_near(target, tokenizer))
            found.append(Unit(len(found), source, start, border))
            start = border
    return found


def encode_units(
    directory: Path,
    spool: CorpusStore,
    split: Split,
    tokenizer: Tokenizer,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Encodes the units missing from `directory` and returns the entries of all units, in order.

    Raises:
        InputError: a character is not in the tokenizer's vocabulary.
        OSError: the disk is full, or another process has finished and moved the directory.
    """
    todo = units(spool, tokenizer)
    done = sum(unit.stop - unit.start for unit in todo if _marker(directory, unit).exists())
    if done:
        logger.info("data: resuming: %.0f MB already encoded", done / 1e6)
    with Progress("data: encoding", spool.num_bytes - done, check) as progress:
        for unit in todo:
            if not _marker(directory, unit).exists():
                _encode_unit(directory, unit, spool, split, tokenizer, progress)
    return [json.loads(_marker(directory, unit).read_text(encoding="utf-8")) for unit in todo]


def _marker(directory: Path, unit: Unit) -> Path:
    return directory / f"unit-{unit.number:05d}.json"


def _encode_unit(
    directory: Path,
    unit: Unit,
    spool: CorpusStore,
    split: Split,
    tokenizer: Tokenizer,
    progress: Progress,
) -> None:
    entry: dict[str, Any] = {"source": unit.source}
    with ExitStack() as stack:
        writers = [stack.enter_context(_Writer(directory, side, unit, tokenizer)) for side in SIDES]
        pieces = split_pieces(spool, split, unit.start, unit.stop, tokenizer)
        for batch in encode_pieces(tokenizer, pieces):
            for writer, tokens, restored in zip(writers, batch.sides, batch.restored, strict=True):
                writer.add(tokens)
                writer.lossless = writer.lossless and restored
            for piece in batch.pieces:
                size = len(piece.text.encode())
                writers[piece.is_val].bytes += size
                writers[piece.is_val].documents += piece.begins
                progress.update(size)
        for writer in writers:
            if writer.tokens:
                entry[writer.side] = writer.close()
    write_atomic(_marker(directory, unit), json.dumps(entry))
    with suppress(OSError):
        os.utime(spool.directory)  # mark as in use for `Cache.delete_abandoned`


def split_pieces(
    spool: CorpusStore, split: Split, start: int, stop: int, tokenizer: Tokenizer
) -> Iterator[Piece]:
    """Yields the kept text within bytes [start, stop) of the corpus store, in pieces to encode."""
    for segment in split.segments(spool, start, stop):
        begins, offset, before = segment.begins, 0, ""
        if not begins and tokenizer.needs_context:
            before = spool.text_before(segment.start, split.start_of(spool, segment), CONTEXT_CHARS)
        texts = spool.text(segment.start, segment.stop)
        for context, text in tokenizer.pieces(texts, before):
            if tokenizer.has_fixed_characters:
                _check(spool, segment.document, segment.start, offset, text, tokenizer)
            yield Piece(text, segment.is_val, begins, context)
            begins, offset = False, offset + len(text)


def _check(
    spool: CorpusStore, document: int, start: int, offset: int, text: str, tokenizer: Tokenizer
) -> None:
    """Raises an `InputError` that names the document and position of an unknown character."""
    try:
        tokenizer.check(text)
    except InputError:
        before = spool.text(int(spool.starts[document]), start)
        position = sum(map(len, before)) + offset
        tokenizer.check(text, spool.name(document), position)
        raise


class _Writer:
    """One token file of a unit, under a temporary name until it is complete."""

    def __init__(self, directory: Path, side: str, unit: Unit, tokenizer: Tokenizer):
        self.side = side
        self.tokens = self.bytes = self.documents = 0
        self.lossless = True
        self._vocab_size, self._dtype = tokenizer.vocab_size, dtype_of(tokenizer)
        self._path = directory / f"{side}-{unit.number:05d}.bin"
        self._pending = pending_name(self._path)
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> "_Writer":
        self._file = self._pending.open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._pending.unlink(missing_ok=True)

    def add(self, tokens: np.ndarray) -> None:
        if not len(tokens):
            return
        # Check here: out-of-range ids would silently give NaN embeddings.
        if tokens.max() >= self._vocab_size:
            expected = f"ids below the vocabulary size {self._vocab_size}"
            raise InputError("data.tokenizer", f"id {tokens.max()}", expected)
        content = tokens.astype(self._dtype).tobytes()
        self._sha256.update(content)
        self._file.write(content)
        self.tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        """Renames the file to its final name and returns its manifest entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._pending, self._path)
        return {
            "file": self._path.name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "sha256": self._sha256.hexdigest(),
            **({} if self.lossless else {"lossless": False}),
        }
