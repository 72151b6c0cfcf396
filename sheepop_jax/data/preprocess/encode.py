"""Encodes a corpus store into token shards, in units that are written atomically.

Interrupted work resumes from the first missing unit and produces the same bytes.

    train-00007.bin, validation-00007.bin   token ids of unit 7, little endian
    train-00007.marks                       of conversations: a byte for each token (`data.marks`)
    unit-00007.json                         their counts and SHA-256; written last
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sheepop_jax.data.preprocess.conversations import (
    ConversationEncoder,
    EncodedSide,
    EncodedSides,
    count_counted,
)
from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.data.preprocess.split import Split
from sheepop_jax.data.shards import SIDES, dtype_of
from sheepop_jax.data.stream import EncodedBatch, Piece, encode_pieces
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


def units(spool: CorpusStore, tokenizer: Tokenizer, whole: bool = False) -> list[Unit]:
    """Splits a corpus store between documents, or within very large ones, by content alone.

    A split within a document leaves its ids as they are; with `whole` there is none.
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
                if border - start > 2 * _UNIT_BYTES and not whole:
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
    conversations: ConversationEncoder | None = None,
) -> list[dict[str, Any]]:
    """Encodes the units missing from `directory` and returns the entries of all units, in order.

    Args:
        directory: of the shards.
        spool: the corpus store.
        split: the split of its documents.
        tokenizer: the tokenizer.
        check: called often; may raise to stop.
        conversations: encodes documents that are conversations; None for text.

    Raises:
        InputError: a character is not in the tokenizer's vocabulary.
        OSError: the disk is full, or another process has finished and moved the directory.
    """
    todo = units(spool, tokenizer, whole=conversations is not None)
    done = sum(unit.stop - unit.start for unit in todo if _marker(directory, unit).exists())
    if done:
        logger.info("data: resuming: %.0f MB already encoded", done / 1e6)
    with Progress("data: encoding", spool.num_bytes - done, check) as progress:
        for unit in todo:
            if not _marker(directory, unit).exists():
                batches = _batches_of(unit, spool, split, tokenizer, conversations)
                _encode_unit(directory, unit, spool, tokenizer, batches, progress)
    return [json.loads(_marker(directory, unit).read_text(encoding="utf-8")) for unit in todo]


def _marker(directory: Path, unit: Unit) -> Path:
    return directory / f"unit-{unit.number:05d}.json"


def _encode_unit(
    directory: Path,
    unit: Unit,
    spool: CorpusStore,
    tokenizer: Tokenizer,
    batches: Iterator[EncodedSides],
    progress: Progress,
) -> None:
    entry: dict[str, Any] = {"source": unit.source}
    left_out = Counter[str]()
    with ExitStack() as stack:
        writers = [stack.enter_context(_Writer(directory, side, unit, tokenizer)) for side in SIDES]
        for batch in batches:
            for writer, side in zip(writers, batch.sides, strict=True):
                writer.add(side)
            left_out.update(batch.left_out)
            progress.update(batch.bytes_read)
        for writer in writers:
            if writer.tokens:
                entry[writer.side] = writer.close()
    entry |= {"left_out": dict(left_out)} if left_out else {}
    write_atomic(_marker(directory, unit), json.dumps(entry))
    with suppress(OSError):
        os.utime(spool.directory)  # mark as in use for `Cache.delete_abandoned`


def _batches_of(
    unit: Unit,
    spool: CorpusStore,
    split: Split,
    tokenizer: Tokenizer,
    conversations: ConversationEncoder | None,
) -> Iterator[EncodedSides]:
    if conversations is not None:
        return conversations.encode(spool, split.segments(spool, unit.start, unit.stop))
    pieces = split_pieces(spool, split, unit.start, unit.stop, tokenizer)
    return map(_sides_of, encode_pieces(tokenizer, pieces))


def _sides_of(batch: EncodedBatch) -> EncodedSides:
    sizes, documents = [0, 0], [0, 0]
    for piece in batch.pieces:
        sizes[piece.is_val] += len(piece.text.encode())
        documents[piece.is_val] += piece.begins
    sides = zip(batch.sides, sizes, documents, batch.restored, strict=True)
    return EncodedSides([EncodedSide(*side) for side in sides], sum(sizes), {})


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
        self._marks: list[np.ndarray] = []

    def __enter__(self) -> "_Writer":
        self._file = self._pending.open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._pending.unlink(missing_ok=True)

    def add(self, side: EncodedSide) -> None:
        self.bytes += side.num_bytes
        self.documents += side.documents
        self.lossless = self.lossless and side.restored
        tokens = side.tokens
        if not len(tokens):
            return
        if side.marks is not None:
            self._marks.append(side.marks)
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
        marks = {}
        if self._marks:  # a byte for each token of a unit: few enough to keep
            whole = np.concatenate(self._marks)
            path = self._path.with_suffix(".marks")
            with (pending := pending_name(path)).open("wb") as file:
                file.write(whole)
                file.flush()
                os.fsync(file.fileno())
            os.replace(pending, path)
            marks = {
                "file": path.name,
                "sha256": hashlib.sha256(whole).hexdigest(),
                "counted": count_counted(whole),
            }
        return {
            "file": self._path.name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "sha256": self._sha256.hexdigest(),
            **({} if self.lossless else {"lossless": False}),
            **({"marks": marks} if marks else {}),
        }
