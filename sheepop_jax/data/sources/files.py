"""Text files, plain or compressed, one document each, read in blocks.

Text is UTF-8 and kept exactly, including line endings and white space; only a byte order mark at
the start of a file is dropped.
"""

import bz2
import codecs
import gzip
import io
import logging
import lzma
import re
import sysconfig
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from sheepop_jax.config.data import COMPRESSED
from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.data.sources.paths import (
    VENDORED,
    Found,
    Walk,
    signature_of,
    size_of,
    walk_files,
)
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

STDLIB_LEFT_OUT = VENDORED | {"test", "tests", "idle_test"}
TEXT_SUFFIXES = frozenset(
    """.txt .text .md .markdown .rst .adoc .org .tex .bib .srt .html .htm .xml .css .scss
    .py .pyi .pyx .ipynb .js .mjs .jsx .ts .tsx .java .kt .kts .scala .groovy .clj .c .h .cc .cpp
    .cxx .hh .hpp .cu .cuh .m .mm .swift .rs .go .zig .cs .fs .vb .rb .pl .pm .php .lua .r .jl .hs
    .ml .mli .ex .exs .erl .el .lisp .scm .f .f90 .pas .asm .s .sh .bash .zsh .fish .ps1 .bat .sql
    .proto .graphql .cmake .toml .yaml .yml .json .ini .cfg .conf .po""".split()
)
_BLOCK_BYTES = 2**20
_MEMBER_BYTES = 2**10  # compressed bytes per decompress call
# Decompression-bomb limit; no real text compresses this well.
_MAX_EXPANSION = 250
_FREE_EXPANSION_BYTES = 2**24  # allowed for any file, however small
# Control bytes that text does not use: all except tab, line and page breaks, and escape.
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class TextFiles:
    """A list of text files; see `documents.Corpus`."""

    def __init__(self, field: str, value: str, found: Found, encoding_errors: str):
        """`encoding_errors`: "strict", "replace" or "skip", for bytes that are not valid UTF-8."""
        self.field, self.value, self.skipped = field, value, found.skipped
        self._files, self._errors = found.files, encoding_errors
        self._replaced = 0
        packed = any(path.suffix.lower() in COMPRESSED for _, path in found.files)
        self.num_bytes = 0 if packed else sum(size_of(path) for _, path in found.files)

    def signature(self) -> str:
        return signature_of((path for _, path in self._files), ("text", 1, self._errors))

    def __iter__(self) -> Iterator[Document]:
        self._replaced = 0
        try:
            for name, path in self._files:
                yield Document(name, self._text(path))
        finally:  # also when data.max_bytes stops reading early
            if self._replaced:
                logger.warning("%d invalid UTF-8 sequences replaced by U+FFFD", self._replaced)

    def _text(self, path: Path) -> Iterator[str]:
        errors = "replace" if self._errors == "replace" else "strict"
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        blocks = _blocks(self.field, path)
        head = edge = b""
        fed, at_start = 0, True
        for block in blocks:
            head = head or block[:4]
            fed += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                if self._errors == "skip":
                    raise SkipDocument("not UTF-8") from None
                offset = fed - len(error.object) + error.start
                raise self._not_utf8(path, head, error, offset) from None
            if errors == "replace":
                # U+FFFD that the file itself contains does not count, even across blocks.
                self._replaced += text.count("\ufffd") - (edge + block).count(b"\xef\xbf\xbd")
                edge = (edge + block)[-2:]
            if at_start and text:
                text, at_start = text.removeprefix("\ufeff"), False
            yield text

    def _not_utf8(
        self, path: Path, head: bytes, error: UnicodeDecodeError, offset: int
    ) -> InputError:
        where = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            kind, hint = "UTF-16 file", f"iconv -f UTF-16 -t UTF-8 {path}"
        elif _CONTROL.search(error.object):
            kind, hint = "binary file", "removing it, or `data.encoding_errors=skip`"
        else:
            kind, hint = (
                "file",
                "converting it, or `data.encoding_errors=replace` or `data.encoding_errors=skip`",
            )
        return InputError(self.field, f"{kind} {path} ({where} is not UTF-8)", "UTF-8 text", hint)


def standard_library() -> TextFiles:
    """Python's standard library without its tests, a corpus available on every machine.

    Raises:
        InputError: this interpreter has no standard library as files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    walk = Walk({".py"}, STDLIB_LEFT_OUT, gitignore=False)
    found = walk_files("data.source", root, walk) if root.is_dir() else Found()
    if not found.files:
        expected = f"an interpreter with its standard library as files in {root}"
        raise InputError("data.source", "stdlib", expected, "`data.path` with text files")
    found.skipped.clear()  # the user chose none of these files
    return TextFiles("data.source", "stdlib", found, "skip")


def _blocks(field: str, path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, decompressed by suffix, and an empty block at the end.

    Raises:
        InputError: the file cannot be read, is damaged, or exceeds the expansion limit.
    """
    try:
        with open_file(path) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
        yield b""
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(field, f"{path} ({reason})", "a readable file") from error


def open_file(path: Path) -> IO[bytes]:
    """Opens a file for reading, decompressed by suffix.

    Reading raises `OSError` above the expansion limit.
    """
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(_Bounded(cast(io.BufferedIOBase, gzip.open(path)), path))
        case ".bz2":
            members = _Members(path, bz2.BZ2Decompressor, 2**16)
        case ".xz":
            members = _Members(path, lzma.LZMADecompressor, 2**16)
        case ".zst":
            # Unlike bz2 and xz, no output limit per call; zstd expands at most 2**15 times.
            members = _Members(path, zstandard.ZstdDecompressor().decompressobj)
        case _:
            return path.open("rb")
    return io.BufferedReader(_Bounded(members, path))


class _Bounded(io.RawIOBase):
    """A decompressed stream that raises `OSError` above the expansion limit."""

    def __init__(self, inner: io.RawIOBase | io.BufferedIOBase, path: Path):
        self._inner = inner
        self._left = path.stat().st_size * _MAX_EXPANSION + _FREE_EXPANSION_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._inner.readinto(buffer) or 0
        self._left -= size
        if self._left < 0:
            raise OSError(
                f"it expands to over {_MAX_EXPANSION} times its size; decompress it first"
            )
        return size

    def close(self) -> None:
        self._inner.close()
        super().close()


class _Members(io.RawIOBase):
    """The concatenated members (streams, frames) of a compressed file, to its last byte.

    The libraries' own readers stop silently at a truncated zst frame and at a damaged second bz2
    or xz member.
    """

    def __init__(self, path: Path, member: Callable[[], Any], *max_output: int):
        self._pieces = self._expand(path, member, max_output)
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        size = min(len(buffer), len(self._piece))
        buffer[:size], self._piece = self._piece[:size], self._piece[size:]
        return size

    def close(self) -> None:
        self._pieces.close()
        super().close()

    @staticmethod
    def _expand(
        path: Path, new_member: Callable[[], Any], max_output: tuple[int, ...]
    ) -> Generator[bytes]:
        with path.open("rb") as file:
            while data := file.read(_MEMBER_BYTES):
                while data := data.lstrip(b"\0"):  # padding between members
                    member = new_member()
                    while not member.eof:
                        if not data and getattr(member, "needs_input", True):
                            data = file.read(_MEMBER_BYTES)
                            if not data:
                                raise EOFError("the compressed data is truncated")
                        yield member.decompress(data, *max_output)
                        data = b""
                    data = member.unused_data
