"""Tables of text: each row of a JSONL, CSV or parquet file is a document, or a line of one.

The text of a row is kept exactly; a CSV cell is what stands in the file, never a number or a gap.
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
from collections.abc import Iterator, Mapping
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
    "json": "JSON with one object a line",
    "csv": "CSV with a line of names and as many cells in each row",
    "parquet": "a parquet file",
}
_CSV_ROWS = 1000  # fewer are slow
_NETWORK_SECONDS = 10  # without a byte
_AS_TEXT = "--config.data.source=files, which reads the file as plain text"


class Table:
    """The rows of some tables of one kind; see `documents.Corpus`."""

    def __init__(
        self,
        kind: Kind,
        field: str,
        value: str,
        items: list[tuple[str, str]],
        text_column: str,
        join_rows: bool,
        skipped: Counter[str],
    ):
        """`items`: (name in messages, path or URL), in the order in which they are read."""
        self.field, self.value, self.skipped = field, value, skipped
        self.num_bytes = 0
        self._kind, self._items = kind, items
        self._column, self._join = text_column, join_rows

    def signature(self) -> str:
        options = ("table", 1, self._kind, self._column, self._join)
        # A URL is the path of no file, so that with one it is "".
        return signature_of((Path(place) for _, place in self._items), options)

    def __iter__(self) -> Iterator[Document]:
        return rows_to_documents(self._rows(), self._column, self.value if self._join else "")

    def _rows(self) -> Iterator[tuple[str, object]]:
        for name, place in self._items:
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
                # The libraries below raise many kinds; all mean a file that cannot be read.
                except Exception as error:
                    hint = "" if self._kind == "parquet" else _AS_TEXT
                    got = f"{place} ({reason_of(error)})"
                    raise InputError(self.field, got, _EXPECTED[self._kind], hint) from error

    def _texts(self, path: str) -> Iterator[object]:
        match self._kind:
            case "json":
                return _json_texts(path, self._column)
            case "csv":
                return _csv_texts(path, self._column)
        return _parquet_texts(path, self._column)


def open_table(
    kind: Kind,
    field: str,
    spec: str,
    text_column: str,
    *,
    join_rows: bool,
    gitignore: bool = True,
    max_file_bytes: int = 0,
) -> Table:
    """Finds the files; none is read yet.

    Args:
        kind: how they are read, whatever their names are.
        field: the configuration field that holds `spec`, for messages.
        spec: as in `paths.find_files`; an item with "://" in it is a URL.
        text_column: the column that is read.
        join_rows: whether the rows are the lines of one document.
        gitignore, max_file_bytes: see `paths.Walk`.

    Raises:
        InputError: a file is not there or cannot be read.
    """
    walk = Walk(SUFFIXES[kind], gitignore=gitignore, max_file_bytes=max_file_bytes)
    items: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    parts = [part.strip() for part in spec.split(",")] if "://" in spec else [spec]
    for remote, group in itertools.groupby(filter(None, parts), lambda part: "://" in part):
        if remote:
            items += ((url, url) for url in group)
            continue
        found = find_files(field, ",".join(group), walk)
        items += ((name, os.path.abspath(path)) for name, path in found.files)
        skipped += found.skipped
    if not items:
        raise InputError(field, spec, "a file, a directory, a glob or a URL")
    return Table(kind, field, spec, items, text_column, join_rows, skipped)


class _BadLine(Exception):
    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


# Not through `datasets`, which guesses each column's type (dates become times, and one number far
# into a column of text turns the strings beside it into quoted JSON), leaves files open, and does
# not tell which line is broken.
def _json_texts(path: str, column: str) -> Iterator[object]:
    rows = _json_rows(path)
    seen: set[str] = set()
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        if column not in seen:  # a row may lack it, but not all of the first ones
            seen.update(*batch)
            if column not in seen:
                raise missing_column(column, seen, _AS_TEXT)
        yield from (row.get(column) for row in batch)


def _json_rows(path: str) -> Iterator[dict[str, object]]:
    """The objects of JSON lines, or of one document (an array, or an object over several lines)."""
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
    raise _BadLine(line, f"a {type(value).__name__} where an object must be")


def _csv_texts(path: str, column: str) -> Iterator[object]:
    import pandas  # here, not above: slow; comes with `datasets`

    options = {
        "sep": "\t" if inner_suffix(Path(path)) == ".tsv" else ",",
        "dtype": str,
        "na_filter": False,
        "chunksize": _CSV_ROWS,
    }
    with open_file(Path(path)) as file, pandas.read_csv(file, **options) as chunks:
        for chunk in chunks:
            if not isinstance(chunk.index, pandas.RangeIndex):  # of the cells that have no name
                raise ValueError("rows have more cells than the first line has names")
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
    """A path to what `place` names; what a URL names is fetched, and removed afterwards.

    Fetched, because to stream it takes an optional package, and of the server that it serves parts.
    """
    if "://" not in place:
        yield place
        return
    name = Path(urllib.parse.urlsplit(place).path).name or "table"
    with tempfile.TemporaryDirectory(prefix="sheepop-") as directory:
        path = os.path.join(directory, name)
        logger.info("data: fetching %s", place)
        try:
            with _open_url(place) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file, 2**20)
                missing = getattr(answer, "length", None)  # what did not come, if the server said
            if missing:
                raise OSError(f"the connection broke {missing} bytes before the end")
        except Exception as error:  # each scheme has kinds of its own
            hint = "the spelling and the network; or download it and give its path"
            got = f"{place} ({_network_reason(error)})"
            raise InputError(field, got, "a file that the network gives", hint) from error
        yield path


def _open_url(url: str) -> IO[bytes]:
    if url.startswith(("http://", "https://")):
        return cast(IO[bytes], urllib.request.urlopen(url, timeout=_NETWORK_SECONDS))
    import fsspec  # comes with `datasets`; knows hf:// and more

    return cast(IO[bytes], fsspec.open(url, "rb").open())


def _network_reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is the answer too
        return f"HTTP {error.code}: {error.reason}"
    reason = getattr(error, "reason", error)
    return reason_of(reason) if isinstance(reason, Exception) else str(reason)
