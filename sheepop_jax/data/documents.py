"""Where text comes from: each source becomes a re-iterable corpus of documents.

One file, or one row of a dataset, is one document. Text is UTF-8 and kept exactly, line endings and
white space included, but for a byte order mark at the start of a file, which says how the file is
encoded and is dropped. A document of white space only is skipped. Memory is bounded by the largest
document.
"""

import codecs
import collections
import glob
import logging
import os
import re
import stat
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sheepop_jax.config import DataConfig
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

# Fetched or generated, not written by the owner of the directory.
_VENDORED = frozenset(
    "node_modules bower_components venv virtualenv __pycache__ site-packages dist-packages".split()
)
_STDLIB_LEFT_OUT = _VENDORED | {"test", "tests", "idle_test"}
_TEXT_SUFFIXES = frozenset(
    """.txt .text .md .markdown .rst .adoc .org .tex .bib .srt .html .htm .xml .css .scss
    .py .pyi .pyx .ipynb .js .mjs .jsx .ts .tsx .java .kt .kts .scala .groovy .clj .c .h .cc .cpp
    .cxx .hh .hpp .cu .cuh .m .mm .swift .rs .go .zig .cs .fs .vb .rb .pl .pm .php .lua .r .jl .hs
    .ml .mli .ex .exs .erl .el .lisp .scm .f .f90 .pas .asm .s .sh .bash .zsh .fish .ps1 .bat .sql
    .proto .graphql .cmake .toml .yaml .yml .json .jsonl .csv .tsv .ini .cfg .conf .po""".split()
)
# Control bytes that text does not use: all but tab, the line and page breaks, and escape.
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


@dataclass(frozen=True)
class Document:
    """One text; `id` names it in messages and does not count as content."""

    id: str
    text: str


class Corpus(Protocol):
    """Documents in an order that is the same at each iteration."""

    def __iter__(self) -> Iterator[Document]:
        """Raises `InputError` at what cannot be read, or at the end if there was no text."""
        ...


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the configured source; nothing but file names is read yet.

    Raises:
        InputError: the source does not exist or has no file that could hold text.
    """
    match config.resolved_source:
        case "files":
            files = _find_files(config.path)
            return _Files("data.path", config.path, files, config.encoding_errors)
        case "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            files = _walk(root, {".py"}, _STDLIB_LEFT_OUT) if root.is_dir() else []
            if not files:
                expected = f"an interpreter that has its standard library as files in {root}"
                raise InputError("data.source", "stdlib", expected, "data.path with text files")
            return _Files("data.source", "stdlib", files, "skip")
        case "hub":
            return _Hub(config.name, config.subset, config.text_column)
        case other:
            raise ValueError(f"no such source: {other!r}")


class _Files:
    """The text of a fixed list of files."""

    def __init__(self, field: str, value: str, files: list[tuple[str, Path]], encoding_errors: str):
        self._field, self._value = field, value
        self._files, self._encoding_errors = files, encoding_errors
        self._reported = False  # a corpus is read several times; once is enough for the log

    def __iter__(self) -> Iterator[Document]:
        found, replaced, undecoded = 0, 0, 0
        for name, path in self._files:
            data = _read_bytes(self._field, path)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                if self._encoding_errors == "strict":
                    raise _not_utf8(self._field, path, data, error) from error
                if self._encoding_errors == "skip":
                    undecoded += 1
                    continue
                text = data.decode("utf-8", errors="replace")
                replaced += text.count("\ufffd") - data.count("\ufffd".encode())
            text = text.removeprefix("\ufeff")
            if text and not text.isspace():
                found += 1
                yield Document(name, text)
        if not found:
            expected = "text (what was found is empty or only white space)"
            raise InputError(self._field, self._value, expected)
        if not self._reported:
            self._reported = True
            if replaced:
                logger.warning("%d invalid UTF-8 sequences replaced by U+FFFD", replaced)
            if undecoded:
                logger.info("%d files that are not UTF-8 skipped", undecoded)


class _Hub:
    """The training rows of a dataset on the Hugging Face hub, streamed."""

    def __init__(self, name: str, subset: str, column: str):
        self._name, self._subset, self._column = name, subset, column

    def __iter__(self) -> Iterator[Document]:
        found = False
        for index, row in enumerate(self._rows()):
            if self._column not in row:
                columns = "one of the columns " + ", ".join(sorted(row))
                raise InputError("data.text_column", self._column, columns)
            text = row[self._column]
            if text is not None and not isinstance(text, str):
                kind = f"{self._column} (rows hold {type(text).__name__})"
                raise InputError("data.text_column", kind, "a column of text")
            if text and not text.isspace():
                found = True
                yield Document(f"{self._name}#{index}", text)
        if not found:
            raise InputError("data.name", self._name, "rows with text in the train split")

    def _rows(self) -> Iterator[dict[str, Any]]:
        logger.info("data: opening %s on the Hugging Face hub", self._name)
        try:
            import datasets  # here, not above: it takes seconds, and only this source needs it

            yield from datasets.load_dataset(
                self._name, self._subset or None, split="train", streaming=True
            )
        except Exception as error:  # the library raises many kinds; all end the same for the user
            if isinstance(error, InputError):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
                detail = " ".join(str(error).split())[:500]
                expected = f"a subset of {self._name} ({detail})"
                raise InputError("data.subset", self._subset, expected) from error
            raise InputError(
                "data.name",
                self._name,
                f"a dataset of the hub with a train split that can be read ({reason})",
                "the spelling and the network; without network, data.path with text files",
            ) from error


def _find_files(spec: str) -> list[tuple[str, Path]]:
    """The files that `data.path` means, as (id, path); a file named twice counts once."""
    # A name may hold a comma, so the whole string is tried as a path before it is taken apart.
    items = [spec] if os.path.lexists(Path(spec).expanduser()) else spec.split(",")
    files: list[tuple[str, Path]] = []
    for item in filter(None, (item.strip() for item in items)):
        path = Path(item).expanduser()
        if glob.has_magic(item) and not os.path.lexists(path):
            files += _expand_glob(item)
            continue
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            files += _walk_text(path)
        elif stat.S_ISREG(mode):
            files.append((path.name, path))
        else:
            got = f"{item} (a pipe, socket or device)"
            raise InputError("data.path", got, "a regular file or a directory")
    if not files:
        raise InputError("data.path", spec, "a file, a directory or a glob")
    first: dict[str, tuple[str, Path]] = {}
    for name, path in files:
        first.setdefault(os.path.realpath(path), (name, path))
    return list(first.values())


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        expected = "an existing file, directory or glob"
        raise InputError("data.path", str(path), expected, "--config.data.path=PATH") from None
    except OSError as error:  # a symlink loop, no permission, a name too long
        got = f"{path} ({error.strerror})"
        raise InputError("data.path", got, "a readable file or directory") from error


def _expand_glob(pattern: str) -> list[tuple[str, Path]]:
    """The regular files that match; `*` and `**` pass over hidden and vendored directories."""
    parts = Path(pattern).expanduser().parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    matches = [Path(match) for match in glob.glob(str(Path(*parts)), recursive=True)]
    names = [(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]
    files = sorted((n, p) for n, p in names if not _VENDORED.intersection(n.split("/")[:-1]))
    if not files:
        raise InputError("data.path", pattern, "a pattern that matches a file")
    return files


def _walk_text(root: Path) -> list[tuple[str, Path]]:
    files = _walk(root, _TEXT_SUFFIXES, _VENDORED)
    if not files:
        there = collections.Counter(
            path.suffix or "no suffix" for _, path in _walk(root, None, _VENDORED)
        )
        found = ", ".join(f"{suffix} x {count}" for suffix, count in there.most_common(5))
        raise InputError(
            "data.path",
            f"{root} (files in it: {found or 'none'})",
            "a directory with text files (.txt, .md, .py ...)",
            f"a glob such as '{root}/**/*{there.most_common(1)[0][0]}'" if found else "",
        )
    return files


def _walk(
    root: Path, suffixes: Collection[str] | None, left_out: Collection[str]
) -> list[tuple[str, Path]]:
    """Regular files below `root`, by relative path; directories are not entered through links."""

    def refuse(error: OSError) -> None:
        got = f"{error.filename} ({error.strerror})"
        raise InputError("data.path", got, "a readable directory")

    files, passed = [], 0
    for parent, directories, names in os.walk(root, onerror=refuse):
        inside = Path(parent)
        for name in list(directories):
            environment = (inside / name / "pyvenv.cfg").exists()  # a venv of any name
            if name.startswith(".") or name in left_out or environment:
                directories.remove(name)
                passed += 1
        for name in names:
            path = inside / name
            wanted = suffixes is None or path.suffix.lower() in suffixes
            # is_file() is False for a pipe, a broken link and a loop of links.
            if wanted and not name.startswith(".") and path.is_file():
                files.append((path.relative_to(root).as_posix(), path))
    if passed:
        logger.debug("%s: %d hidden or vendored directories passed over", root, passed)
    return sorted(files)


def _read_bytes(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(field, f"{path} ({error.strerror})", "a readable file") from error


def _not_utf8(field: str, path: Path, data: bytes, error: UnicodeDecodeError) -> InputError:
    where = f"byte 0x{data[error.start]:02x} at offset {error.start}"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        kind, hint = "UTF-16 file", f"iconv -f UTF-16 -t UTF-8 {path}"
    elif _CONTROL.search(data):
        kind, hint = "binary file", "leaving it out"
    else:
        kind, hint = "file", "converting it, or data.encoding_errors=replace"
    return InputError(field, f"{kind} {path} ({where} is not UTF-8)", "UTF-8 text", hint)
