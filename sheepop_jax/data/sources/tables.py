"""JSONL, CSV and parquet tables: each row is a document, or a line of one.

Text is kept exactly; CSV cells are always strings, never parsed as numbers or missing values.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from sheepop_jax.config.data import TABLE_SUFFIXES, inner_suffix
from sheepop_jax.data.sources.documents import Document
from sheepop_jax.data.sources.files import open_file
from sheepop_jax.data.sources.paths import Walk, find_files, signature_of
from sheepop_jax.data.sources.rows import (
    BATCH_ROWS,
    missing_column,
    reason_of,
    rows_to_documents,
)
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

Kind = Literal["json", "csv", "parquet"]
SUFFIXES: Mapping[Kind, frozenset[str]] = {
    kind: frozenset(suffix for suffix, of in TABLE_SUFFIXES.items() if of == kind)
    for kind in ("json", "csv", "parquet")
}
_EXPECTED = {
    "json": "JSON with one object per line",
    "csv": "CSV with a header line and as many cells in each row",
    "parquet": "a parquet file",
}
_CSV_ROWS = 1000  # rows per chunk; small chunks are slow
_NETWORK_SECONDS = 10  # socket timeout
_AS_TEXT = "`data.source=files` to read the file as plain text"


@dataclass
class Table:
    """The rows of tables of one kind; see `documents.Corpus`.

    Attributes:
        kind: the format to parse, regardless of file names.
        field, value: the configuration field and its value, for messages.
        items: (name in messages, path or URL) in reading order.
        column: the column to read.
        join_rows: whether the rows are the lines of one document.
        skipped: files that were left out, by reason.
    """

    kind: Kind
    field: str
    value: str
    items: list[tuple[str, str]]
    column: str
    join_rows: bool
    skipped: Counter[str]
    num_bytes: int = 0  # unknown before the rows are read

    def signature(self) -> str:
        options = ("table", 1, self.kind, self.column, self.join_rows)
        # A URL is not an existing path, so any URL makes the signature "".
        return signature_of((Path(place) for _, place in self.items), options)

    def __iter__(self) -> Iterator[Document]:
        return rows_to_documents(self._rows(), self.column, self.value if self.join_rows else "")

    def _rows(self) -> Iterator[tuple[str, object]]:
        for name, place in self.items:
            with _on_disk(self.field, place) as path:
                try:
                    for index, text in enumerate(self._texts(path)):
                        yield f"{name}#{index}", text
                except InputError:
                    raise
                except _BadLine as error:
                    got = f"{place} (line {error.line}: {error})"
                    hint = f"correcting that line, or {_AS_TEXT}"
                    raise InputError(self.field, got, _EXPECTED["json"], hint) from None
                # The libraries raise many types; all mean an unreadable file.
                except Exception as error:
                    hint = "" if self.kind == "parquet" else _AS_TEXT
                    got = f"{place} ({reason_of(error)})"
                    raise InputError(self.field, got, _EXPECTED[self.kind], hint) from error

    def _texts(self, path: str) -> Iterator[object]:
        match self.kind:
            case "json":
                return _json_texts(path, self.column)
            case "csv":
                return _csv_texts(path, self.column)
        return _parquet_texts(path, self.column)


def open_table(
    kind: Kind,
    field: str,
    spec: str,
    text_column: str,
    join_rows: bool,
    walk: Callable[[frozenset[str]], Walk] = Walk,
) -> Table:
    """Finds the files of a table source; reads none.

    Args:
        kind: the format to parse, regardless of file names.
        field: the configuration field that holds `spec`, for messages.
        spec: as in `paths.find_files`; an item with "://" is a URL.
        text_column: the column to read.
        join_rows: whether to join the rows as the lines of one document.
        walk: makes the `paths.Walk` for the suffixes of `kind`.

    Raises:
        InputError: a file does not exist or cannot be read.
    """
    items: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    parts = [part.strip() for part in spec.split(",")] if "://" in spec else [spec]
    for remote, group in itertools.groupby(filter(None, parts), lambda part: "://" in part):
        if remote:
            items += ((url, url) for url in group)
            continue
        found = find_files(field, ",".join(group), walk(SUFFIXES[kind]))
        items += ((name, os.path.abspath(path)) for name, path in found.files)
        skipped += found.skipped
    if not items:
        raise InputError(field, spec, "a file, a directory, a glob or a URL")
    return Table(kind, field, spec, items, text_column, join_rows, skipped)


class _BadLine(Exception):
    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


# Not `datasets`: it infers column types (dates become timestamps, and one number far into a text
# column turns the strings beside it into quoted JSON), leaves files open, and does not report the
# invalid line.
def _json_texts(path: str, column: str) -> Iterator[object]:
    rows = _json_rows(path)
    seen: set[str] = set()
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        if column not in seen:  # single rows may lack it, but not a whole first batch
            seen.update(*batch)
            if column not in seen:
                raise missing_column(column, seen, _AS_TEXT)
        yield from (row.get(column) for row in batch)


def _json_rows(path: str) -> Iterator[dict[str, object]]:
    """Yields the objects of JSON lines, or of one array or multi-line object."""
    first = True
    with open_file(Path(path)) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            text = line.strip()
            if not text:
                continue
            if first and (text.startswith(b"[") or text == b"{"):
                document = _parse(number, line + file.read())
                for row in document if isinstance(document, list) else [document]:
                    yield _object(number, row)
                return
            first = False
            yield _object(number, _parse(number, text))


def _parse(line: int, data: bytes) -> object:
    try:
        return json.loads(data.decode())
    except json.JSONDecodeError as error:
        message = f"{error.msg} at column {error.colno}"
        raise _BadLine(line + error.lineno - 1, message) from None
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise _BadLine(line + data.count(b"\n", 0, error.start), where) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number too long
        raise _BadLine(line, reason_of(error)) from None


def _object(line: int, value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    raise _BadLine(line, f"{type(value).__name__}, not an object")


def _csv_texts(path: str, column: str) -> Iterator[object]:
    import pandas  # lazy: slow to import; a dependency of `datasets`

    options = {
        "sep": "\t" if inner_suffix(Path(path)) == ".tsv" else ",",
        "dtype": str,
        "na_filter": False,
        "chunksize": _CSV_ROWS,
    }
    with open_file(Path(path)) as file, pandas.read_csv(file, **options) as chunks:
        for chunk in chunks:
            # pandas turns unnamed extra cells into the index.
            if not isinstance(chunk.index, pandas.RangeIndex):
                raise ValueError("rows have more cells than the header")
            if column not in chunk:
                raise missing_column(column, chunk, _AS_TEXT)
            yield from chunk[column].tolist()


def _parquet_texts(path: str, column: str) -> Iterator[object]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        if column not in file.schema_arrow.names:
            raise missing_column(column, file.schema_arrow.names)
        for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
            yield from batch.column(0).to_pylist()


@contextlib.contextmanager
def _on_disk(field: str, place: str) -> Iterator[str]:
    """Yields a local path for `place`; a URL is downloaded to a temporary file.

    Streaming would need an optional package and a server that supports range requests.
    """
    if "://" not in place:
        yield place
        return
    name = Path(urllib.parse.urlsplit(place).path).name or "table"
    with tempfile.TemporaryDirectory(prefix="sheepop-") as directory:
        path = os.path.join(directory, name)
        logger.info("data: downloading %s", place)
        try:
            with _open_url(place) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file, 2**20)
                # Bytes still missing, if the server sent a length.
                missing = getattr(answer, "length", None)
            if missing:
                raise OSError(f"the connection closed {missing} bytes before the end")
        except Exception as error:  # each URL scheme raises its own types
            hint = "checking the spelling and the network, or downloading it and passing its path"
            got = f"{place} ({_network_reason(error)})"
            raise InputError(field, got, "a file that can be downloaded", hint) from error
        yield path


def _open_url(url: str) -> IO[bytes]:
    if url.startswith(("http://", "https://")):
        return cast(IO[bytes], urllib.request.urlopen(url, timeout=_NETWORK_SECONDS))
    import fsspec  # a dependency of `datasets`; handles hf:// and more

    return cast(IO[bytes], fsspec.open(url, "rb").open())


def _network_reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # the exception is also the open response
        return f"HTTP {error.code}: {error.reason}"
    reason = getattr(error, "reason", error)
    return reason_of(reason) if isinstance(reason, Exception) else str(reason)
