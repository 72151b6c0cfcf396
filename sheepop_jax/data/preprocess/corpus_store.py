"""The text of a corpus, read once from its sources into one file with an index of its documents.

Whatever the source, everything later (the split, the tokenizer, the tokens) reads from here: a slow
source is read once, text cannot change halfway, and memory stays bounded. Deleted when the tokens
are made.

    text.bin         the documents' UTF-8, one after the other
    documents.bin    a record for each document: DOCUMENT
    names.txt        the id of each, one a line, as JSON
    spool.json       the sources, what was skipped and why, the fingerprint; written last
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
from sheepop_jax.data.preprocess.progress import Progress
from sheepop_jax.data.sources.documents import Corpus, Document, SkipDocument
from sheepop_jax.data.tokenizer import CUT
from sheepop_jax.errors import InputError

DOCUMENT = np.dtype(
    [
        ("end", "<i8"),  # one beyond its last byte in text.bin
        ("chars", "<i8"),
        ("digest", "<u8", 2),  # the first 16 bytes of the content's SHA-256
        ("source", "<u2"),
        ("held_out", "?"),  # by the source itself
    ]
)
_BLOCK_BYTES = 2**20


class CorpusStore:
    """A corpus that was read whole.

    Attributes:
        documents: DOCUMENT [N].
        starts: int64 [N], the first byte of each document.
        num_bytes: of all documents.
        sources: name, weight and skipped documents of each source.
        fingerprint: SHA-256 over source, side and content of each document, in order; the names and
            places of files do not count.
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
        # Stays readable if the file is deleted; closed when nobody holds the spool any more.
        self._file = os.open(directory / "text.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def text(self, start: int, stop: int) -> Iterator[str]:
        """The text of bytes [start, stop), which must begin and end between characters."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        while start < stop:
            block = os.pread(self._file, min(_BLOCK_BYTES, stop - start), start)
            if not block:
                raise OSError(f"{self.directory / 'text.bin'} ends at byte {start}")
            start += len(block)
            yield decoder.decode(block, final=start >= stop)

    def byte_of_char(self, document: int, char: int) -> int:
        """Where in text.bin a document's character begins; `char` counts from 0."""
        position = int(self.starts[document])
        for piece in self.text(position, int(self.documents["end"][document])):
            if char < len(piece):
                return position + len(piece[:char].encode())
            char -= len(piece)
            position += len(piece.encode())
        return position

    def cut_near(self, position: int) -> int:
        """A place from `position` on, near it, where a tokenizer may be given the text in two.

        Before a space or a line break that follows something else, GPT-2's pre-tokenizer always
        cuts. Where none is near it is the next border of characters.
        """
        block = os.pread(self._file, 2**16, position)
        lead = next((i for i, byte in enumerate(block) if byte & 0xC0 != 0x80), len(block))
        window = block[lead:].decode("utf-8", errors="ignore")  # its end may cut a character
        near = CUT.search(window)
        return position + lead + (len(window[: near.end()].encode()) if near else 0)

    def name(self, document: int) -> str:
        """The id of a document, for messages."""
        with (self.directory / "names.txt").open(encoding="utf-8") as file:
            return str(json.loads(next(itertools.islice(file, document, None))))


class Record(NamedTuple):
    """What the index keeps of one document, and whether `max_bytes` has cut it off.

    Without bytes it was left out.
    """

    num_bytes: int = 0
    chars: int = 0
    digest: bytes = b""
    last: bool = False


def write_corpus_store(
    directory: Path,
    sources: list[tuple[Part, Corpus]],
    check: Callable[[], None] = lambda: None,
) -> CorpusStore:
    """Reads all sources into `directory`, which exists; `check` is called often and may raise.

    Raises:
        InputError: a source cannot be read or has no text.
        OSError: the directory has no room.
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
                    record = _copy(document, text, end, part, room, skipped, progress)
                    if record.num_bytes:
                        end += record.num_bytes
                        held_out = document.held_out
                        digest = tuple(np.frombuffer(record.digest[:16], "<u8"))
                        row = np.array((end, record.chars, digest, number, held_out), DOCUMENT)
                        index.write(row.tobytes())
                        names.write(json.dumps(document.id) + "\n")
                        fingerprint.update(record.digest + bytes([held_out]) + number.to_bytes(2))
                        if room is not None and not held_out:
                            room -= record.num_bytes
                    if record.last:
                        break
            if end == first:
                found = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "nothing"
                raise InputError(corpus.field, corpus.value, f"text (what was found: {found})")
            about.append({"name": part.name, "weight": part.weight, "skipped": dict(skipped)})
        for file in (text, index, names):
            file.flush()
            os.fsync(file.fileno())
    content = json.dumps({"sources": about, "fingerprint": fingerprint.hexdigest()})
    (directory / "spool.json").write_text(content, encoding="utf-8")
    return CorpusStore(directory)


def _total(sources: list[tuple[Part, Corpus]]) -> int:
    """About how many bytes will be read; 0 if that is unknown of one source."""
    sizes = [corpus.num_bytes for _, corpus in sources]
    return sum(sizes) if all(sizes) else 0


def _copy(
    document: Document,
    text: BinaryIO,
    start: int,
    part: Part,
    room: int | None,
    skipped: Counter[str],
    progress: Progress,
) -> Record:
    """Appends a document to the text, which ends at `start` again if it is left out."""
    digest = hashlib.sha256()
    size = chars = 0
    blank, full = True, False
    try:
        for piece in document.pieces:
            content = _encode(piece, document, part.config.encoding_errors)
            full = room is not None and not document.held_out and size + len(content) >= room
            if full:  # the last document ends where the limit is
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
    except SkipDocument as reason:
        skipped[str(reason)] += 1
    else:
        if not blank:
            return Record(size, chars, digest.digest(), full)
        if not full:  # what was cut off may be more than white space
            skipped["empty or only white space"] += 1
    text.seek(start)
    text.truncate()
    return Record(last=full)


def _encode(piece: str, document: Document, errors: str) -> bytes:
    """UTF-8; half a surrogate pair, which a JSON escape can hold, is treated as bad bytes are."""
    try:
        return piece.encode()
    except UnicodeEncodeError as error:
        if errors == "skip":
            raise SkipDocument("not Unicode (half a surrogate pair)") from None
        if errors == "replace":
            return piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        got = f"U+{ord(piece[error.start]):04X}"
        expected = "valid Unicode (half a surrogate pair is not)"
        raise InputError(document.id, got, expected, "data.encoding_errors=replace") from None
