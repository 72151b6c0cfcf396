"""Text files, plain or compressed, one document each, read in blocks.

Text is UTF-8 and kept exactly, including line endings and white space; only a byte order mark at
the start of a file is dropped. Files that are not text are refused. Notebooks give the sources of
their cells, and zip archives the text files in them.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import logging
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from sheepop_jax.config.data import COMPRESSED, inner_suffix
from sheepop_jax.data.sources.binary import CONTROL, BinaryCheck, kind_of
from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.data.sources.notebooks import notebook_text
from sheepop_jax.data.sources.paths import (
    VENDORED,
    Found,
    Walk,
    find_files,
    signature_of,
    size_of,
    split_urls,
    walk_files,
)
from sheepop_jax.data.sources.web import cached_text
from sheepop_jax.data.sources.zips import members
from sheepop_jax.errors import InputError, masked

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
_SKIP_BINARY = "removing it, or `data.encoding_errors=skip`"
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class TextFiles:
    """A list of text files; see `documents.Corpus`."""

    def __init__(
        self,
        field: str,
        value: str,
        found: Found,
        encoding_errors: str,
        urls: Sequence[str] = (),
        downloads: Path = Path(),
        walk: Walk | None = None,
    ):
        """Args:
        field, value: the configuration field and its value, for messages.
        found: the files.
        encoding_errors: "strict", "replace" or "skip", for bytes that are not valid UTF-8.
        urls: of texts, read after the files.
        downloads: the directory for copies of the texts at URLs.
        walk: the rules for the members of zip archives; None reads notebooks and archives as they
            are.
        """
        self.field, self.value, self.skipped = field, masked(value), found.skipped
        self._files, self._errors = found.files, encoding_errors
        self._urls, self._downloads, self._walk = urls, downloads, walk
        self._replaced = self._tagged = 0
        self.paths = [path for _, path in found.files]
        unknown = urls or any(path.suffix.lower() in {*COMPRESSED, ".zip"} for path in self.paths)
        self.num_bytes = 0 if unknown else sum(size_of(path) for path in self.paths)

    def signature(self) -> str:
        if self._urls:
            return ""
        # Version 2 converts notebooks and reads archives.
        converted = self._walk and any(inner_suffix(p) in (".ipynb", ".zip") for p in self.paths)
        return signature_of(self.paths, ("text", 2 if converted else 1, self._errors))

    def __iter__(self) -> Iterator[Document]:
        self._replaced = self._tagged = 0
        try:
            for name, path in self._files:
                yield from self._documents(name, path)
            for url in self._urls:
                path = cached_text(self.field, url, self._downloads)
                yield from self._documents(masked(url), path)
        finally:  # also when data.max_bytes stops reading early
            if self._replaced:
                logger.warning("%d invalid UTF-8 sequences replaced by U+FFFD", self._replaced)
            if self._tagged:
                logger.warning(
                    "%d HTML files read with their tags; convert them first for text alone, for "
                    "example with 'pandoc --to=plain'",
                    self._tagged,
                )

    def _documents(self, name: str, path: Path) -> Iterator[Document]:
        """Yields the text of a file, or the texts in a zip archive."""
        if self._walk is None or path.suffix.lower() != ".zip":
            yield Document(name, self._text(path, _blocks(self.field, path)))
            return
        bound = size_of(path) * _MAX_EXPANSION + _FREE_EXPANSION_BYTES
        with contextlib.closing(members(self.field, path, self._walk, bound)) as found:
            for member, blocks in found:
                yield Document(f"{name}/{member}", self._text(path / member, blocks))

    def _text(self, path: Path, blocks: Generator[bytes, None, None]) -> Iterator[str]:
        if self._walk is not None and inner_suffix(path) in (".html", ".htm"):
            self._tagged += 1
        with contextlib.closing(blocks):  # also the file, after an error in the text
            if self._walk is None or inner_suffix(path) != ".ipynb":
                yield from self._decoded(path, blocks)
                return
            content = "".join(self._decoded(path, blocks))
            try:
                yield notebook_text(content)
            except ValueError:
                raise SkipDocument("damaged notebooks") from None

    def _decoded(self, path: Path, blocks: Iterator[bytes]) -> Iterator[str]:
        errors = "replace" if self._errors == "replace" else "strict"
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        check = BinaryCheck()
        edge = b""
        fed, at_start = 0, True
        for block in blocks:
            fed += len(block)
            binary = check.is_binary(block)
            try:
                text = "" if binary else decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                if self._errors == "skip":
                    raise SkipDocument("not UTF-8") from None
                offset = fed - len(error.object) + error.start
                raise self._not_utf8(path, check.head, error, offset) from None
            if binary:
                raise self._binary(path, check)
            if errors == "replace":
                # U+FFFD that the file itself contains does not count, even across blocks.
                self._replaced += text.count("\ufffd") - (edge + block).count(b"\xef\xbf\xbd")
                edge = (edge + block)[-2:]
            if at_start and text:
                text, at_start = text.removeprefix("\ufeff"), False
            yield text

    def _binary(self, path: Path, check: BinaryCheck) -> Exception:
        if self._errors == "skip":
            return SkipDocument("binary files")
        kind, hint = kind_of(check.head, path)
        if kind == "a zip archive" and path.suffix.lower() == ".zip":
            hint = "leaving out `data.source=files`, or unpacking it"
        what = kind or f"{check.share:.0%} of its bytes are control characters"
        hint = f"{hint}, or {_SKIP_BINARY}" if hint else _SKIP_BINARY
        return InputError(self.field, f"binary file {path} ({what})", "UTF-8 text", hint)

    def _not_utf8(
        self, path: Path, head: bytes, error: UnicodeDecodeError, offset: int
    ) -> InputError:
        where = f"byte 0x{error.object[error.start]:02x} at offset {offset} is not UTF-8"
        kind, hint = kind_of(head, path)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            name, hint = "UTF-16 file", f"iconv -f UTF-16 -t UTF-8 {path}"
        elif kind or CONTROL.search(error.object):
            name = "binary file"
            hint = f"{hint}, or {_SKIP_BINARY}" if hint else _SKIP_BINARY
            where = f"{kind}; {where}" if kind else where
        else:
            name = "file"
            hint = (
                f"iconv -f WINDOWS-1252 -t UTF-8 {path} (or its other encoding), or "
                "`data.encoding_errors=replace` or `data.encoding_errors=skip`"
            )
        return InputError(self.field, f"{name} {path} ({where})", "UTF-8 text", hint)


def open_texts(
    field: str,
    spec: str,
    encoding_errors: str,
    walk: Walk,
    downloads: Path,
    *,
    as_they_are: bool = False,
) -> TextFiles:
    """Finds text files; reads and downloads none.

    Args:
        field: the configuration field that holds `spec`, for messages.
        spec: as in `paths.find_files`; an item that begins with http:// or https:// is a URL.
        encoding_errors: as in `TextFiles`.
        walk: the rules for directories and archives.
        downloads: the directory for copies of the texts at URLs.
        as_they_are: whether to read notebooks as JSON, and no zip archives.

    Raises:
        InputError: a file does not exist or cannot be read.
    """
    local, urls = split_urls(spec, ("http", "https"))
    found = find_files(field, local, walk) if local or not urls else Found()
    inside = None if as_they_are else walk
    return TextFiles(field, spec, found, encoding_errors, urls, downloads, inside)


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


def _blocks(field: str, path: Path) -> Generator[bytes, None, None]:
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
