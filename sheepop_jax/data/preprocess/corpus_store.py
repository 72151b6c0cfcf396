"""The corpus store: the text of all sources in one file, with an index of documents.

Split, tokenizer and encoding read from here: a slow source is read once, the text cannot change
midway, and memory is bounded. The store is deleted once the tokens are written.

    text.bin         the documents' UTF-8, concatenated
    documents.bin    one DOCUMENT record per document
    names.txt        the document ids, one JSON string per line
    spool.json       the sources, skipped documents by reason, the fingerprint; written last
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from sheepop_jax.config.data import Part
from sheepop_jax.data.sources.documents import Corpus, Document, SkipDocument
from sheepop_jax.data.tokenizer import CONTEXT_CHARS, CUT, Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.progress import Progress

DOCUMENT = np.dtype(
    [
        ("end", "<i8"),  # exclusive end offset in text.bin
        ("chars", "<i8"),
        ("digest", "<u8", 2),  # the first 16 bytes of the content's SHA-256
        ("source", "<u2"),
        ("is_val", "?"),  # in the source's own validation split
    ]
)
_BLOCK_BYTES = 2**20


class CorpusStore:
    """A complete corpus store, open for reading.

    Attributes:
        documents: DOCUMENT [N].
        starts: int64 [N], the first byte of each document.
        num_bytes: bytes of all documents.
        sources: name, weight and skipped documents of each source.
        fingerprint: SHA-256 over source, split and content of each document, in order; independent
            of file names and locations.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        about = json.loads((directory / "spool.json").read_text(encoding="utf-8"))
        self.sources: list[dict[str, Any]] = about["sources"]
        self.fingerprint: str = about["fingerprint"]
        self.documents = np.fromfile(directory / "documents.bin", DOCUMENT)
        ends = self.documents["end"]
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.num_bytes = int(ends[-1])
        # The open file stays readable if it is deleted; the finalizer closes it.
        self._file = os.open(directory / "text.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def text(self, start: int, stop: int) -> Iterator[str]:
        """Yields the text of bytes [start, stop); both must be character boundaries."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        while start < stop:
            block = os.pread(self._file, min(_BLOCK_BYTES, stop - start), start)
            if not block:
                raise OSError(f"{self.directory / 'text.bin'} ends at byte {start}")
            start += len(block)
            yield decoder.decode(block, final=start >= stop)

    def byte_of_char(self, document: int, char: int) -> int:
        """Byte offset in text.bin of character `char` (from 0) of a document."""
        position = int(self.starts[document])
        for piece in self.text(position, int(self.documents["end"][document])):
            if char < len(piece):
                return position + len(piece[:char].encode())
            char -= len(piece)
            position += len(piece.encode())
        return position

    def text_before(self, position: int, first: int, chars: int) -> str:
        """Up to `chars` characters that end at byte `position`, none of them before `first`."""
        start = max(first, position - 4 * chars)  # UTF-8 has at most 4 bytes per character
        block = os.pread(self._file, position - start, start)
        return block.decode(errors="ignore")[-chars:]  # it may begin within a character

    def cut_near(self, position: int, tokenizer: Tokenizer) -> int:
        """The next byte offset from `position` on where splitting does not change the tokens.

        It is within 64 KiB, and within the document or at its end.
        """
        block = os.pread(self._file, 2**16, position)
        lead = next((i for i, byte in enumerate(block) if byte & 0xC0 != 0x80), len(block))
        window = block[lead:].decode("utf-8", errors="ignore")  # it may end within a character
        document = np.searchsorted(self.documents["end"][:-1], position, side="right")
        before = self.text_before(position + lead, int(self.starts[document]), CONTEXT_CHARS)
        places = (len(before) + near.end() for near in CUT.finditer(window))
        cut = tokenizer.find_cut(before + window, places, len(before), after=True) - len(before)
        return position + lead + len(window[:cut].encode())

    def name(self, document: int) -> str:
        """The id of a document, for messages."""
        with (self.directory / "names.txt").open(encoding="utf-8") as file:
            return str(json.loads(next(itertools.islice(file, document, None))))


class Record(NamedTuple):
    """Index entry of one document; 0 bytes if it was skipped.

    Attributes:
        num_bytes: of its UTF-8 text.
        chars: code points.
        digest: SHA-256 of the text.
        last: whether `max_bytes` is reached.
        skipped: the reason for skipping it.
    """

    num_bytes: int = 0
    chars: int = 0
    digest: bytes = b""
    last: bool = False
    skipped: str = ""


def write_corpus_store(
    directory: Path,
    sources: list[tuple[Part, Corpus]],
    check: Callable[[], None] = lambda: None,
) -> CorpusStore:
    """Reads all sources into a new corpus store.

    Args:
        directory: an existing empty directory.
        sources: the parts of the mixture, and their corpora.
        check: called often; may raise to stop.

    Raises:
        InputError: a source cannot be read or has no text.
        OSError: the disk is full.
    """
    fingerprint = hashlib.sha256()
    about: list[dict[str, Any]] = []
    end = 0
    with (
        (directory / "text.bin").open("wb") as text,
        (directory / "documents.bin").open("wb") as index,
        (directory / "names.txt").open("w", encoding="utf-8") as names,
        Progress("data: reading", _total(sources), check) as progress,
    ):
        for number, (part, corpus) in enumerate(sources):
            skipped = Counter(corpus.skipped)
            room = part.config.max_bytes or None
            first = end
            documents = cast(Generator[Document], iter(corpus))
            with contextlib.closing(documents):  # a source may hold a connection
                for document in documents:
                    record = _copy(document, text, part, room, progress)
                    if record.skipped:
                        skipped[record.skipped] += 1
                    if record.num_bytes:
                        end += record.num_bytes
                        is_val = document.is_val
                        digest = tuple(np.frombuffer(record.digest[:16], "<u8"))
                        row = np.array((end, record.chars, digest, number, is_val), DOCUMENT)
                        index.write(row.tobytes())
                        names.write(json.dumps(document.id) + "\n")
                        fingerprint.update(record.digest + bytes([is_val]) + number.to_bytes(2))
                        if room is not None and not is_val:
                            room -= record.num_bytes
                    if record.last:
                        break
            if end == first:
                found = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "nothing"
                raise InputError(corpus.field, corpus.value, f"a source with text (found: {found})")
            about.append({"name": part.name, "weight": part.weight, "skipped": dict(skipped)})
        for file in (text, index, names):
            file.flush()
            os.fsync(file.fileno())
    content = json.dumps({"sources": about, "fingerprint": fingerprint.hexdigest()})
    (directory / "spool.json").write_text(content, encoding="utf-8")
    return CorpusStore(directory)


def _total(sources: list[tuple[Part, Corpus]]) -> int:
    """Approximate bytes to read; 0 if unknown for any source."""
    sizes = [corpus.num_bytes for _, corpus in sources]
    return sum(sizes) if all(sizes) else 0


def _copy(
    document: Document,
    text: BinaryIO,
    part: Part,
    room: int | None,
    progress: Progress,
) -> Record:
    """Appends a document to the text file; truncates the file again if it is skipped."""
    start = text.tell()
    digest = hashlib.sha256()
    size = chars = 0
    blank, full = True, False
    try:
        for piece in document.pieces:
            content = _encode(piece, document, part.config.encoding_errors)
            full = room is not None and not document.is_val and size + len(content) >= room
            if full and document.whole and size + len(content) > (room or 0):
                raise SkipDocument("")
            if full:  # cut the last document at the limit
                content = content[: (room or 0) - size].decode(errors="ignore").encode()
            piece = content.decode()
            digest.update(content)
            text.write(content)
            size += len(content)
            chars += len(piece)
            blank = blank and (not piece or piece.isspace())
            progress.update(len(content))
            if full:
                break
        if not blank:
            return Record(size, chars, digest.digest(), full)
        reason = "" if full else "empty or only white space"  # the part cut off may hold text
    except SkipDocument as error:
        reason = str(error)
    text.seek(start)
    text.truncate()
    return Record(last=full, skipped=reason)


def _encode(piece: str, document: Document, errors: str) -> bytes:
    """Encodes as UTF-8; lone surrogates (possible in JSON escapes) count as invalid bytes."""
    try:
        return piece.encode()
    except UnicodeEncodeError as error:
        if errors == "skip":
            raise SkipDocument("not Unicode (lone surrogate)") from None
        if errors == "replace":
            return piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        got = f"U+{ord(piece[error.start]):04X}"
        expected = "valid Unicode without lone surrogates"
        raise InputError(document.id, got, expected, "`data.encoding_errors=replace`") from None
