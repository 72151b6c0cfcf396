"""JSONL, CSV and parquet tables: each row is a document, or a line of one.

Text is kept exactly; CSV cells are always strings, never parsed as numbers or missing values.
"""

import codecs
import csv
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sheepop_jax.config.data import TABLE_SUFFIXES, inner_suffix
from sheepop_jax.data.sources.conversations import conversation_columns
from sheepop_jax.data.sources.documents import Document
from sheepop_jax.data.sources.files import open_file
from sheepop_jax.data.sources.paths import Walk, find_files, signature_of
from sheepop_jax.data.sources.rows import (
    BATCH_ROWS,
    SAMPLE_ROWS,
    Decoder,
    has_column,
    missing_column,
    reason_of,
    rows_to_documents,
    undecoded,
    value_at,
)
from sheepop_jax.data.sources.web import on_disk
from sheepop_jax.errors import InputError, masked

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
Kind = Literal["json", "csv", "quoted_tsv", "parquet"]
SUFFIXES: Mapping[Kind, frozenset[str]] = {
    "json": frozenset({suffix for suffix, kind in TABLE_SUFFIXES.items() if kind == "json"}),
    "csv": frozenset({".csv", ".tsv"}),
    "quoted_tsv": frozenset({".tsv"}),
    "parquet": frozenset({".parquet"}),
}
_EXPECTED = {
    "json": "JSON with one object per line",
    "csv": "CSV with a header line and as many cells in each row",
    "quoted_tsv": "TSV with a header line and as many cells in each row",
    "parquet": "a parquet file",
}
_CSV_ROWS = 1000  # rows per chunk; small chunks are slow
_CONVERT = "iconv -f WINDOWS-1252 -t UTF-8 FILE (or its other encoding)"
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
        encoding_errors: "strict", "replace" or "skip", for text that is not valid UTF-8.
        skipped: files that were left out, by reason.
    """

    kind: Kind
    field: str
    value: str
    items: list[tuple[str, str]]
    column: str
    join_rows: bool
    encoding_errors: str
    skipped: Counter[str]
    num_bytes: int = 0  # unknown before the rows are read

    def signature(self) -> str:
        # Version 2 reads quotation marks in TSV as text.
        tabs = self.kind == "csv" and any(_is_tsv(place) for _, place in self.items)
        options = ("table", 2 if tabs else 1, self.kind, self.column, self.join_rows)
        # A URL is not an existing path, so any URL makes the signature "".
        return signature_of((Path(place) for _, place in self.items), options)

    def __iter__(self) -> Iterator[Document]:
        # Spreadsheets write CSV in the encoding of their system.
        convert = _CONVERT if self.kind in ("csv", "quoted_tsv") else ""
        decoder = Decoder(self.field, self.encoding_errors, convert)
        joined = self.value if self.join_rows else ""
        return rows_to_documents(self._rows(self._texts), self.column, decoder, joined)

    def records(self) -> Iterator[tuple[str, Mapping[str, object], bool]]:
        """Yields the id, the columns that may hold a conversation, and False of each row."""
        for name, row in self._rows(self._records):
            yield name, row, False

    def _rows(self, read: Callable[[str], Iterator[_T]]) -> Iterator[tuple[str, _T]]:
        for name, place in self.items:
            with on_disk(self.field, place) as path:
                try:
                    for index, row in enumerate(read(path)):
                        yield f"{name}#{index}", row
                except InputError:
                    raise
                except _BadLine as error:
                    got = f"{place} (line {error.line}: {error})"
                    hint = f"correcting that line, {error.hint}or {_AS_TEXT}"
                    raise InputError(self.field, got, _EXPECTED["json"], hint) from None
                # The libraries raise many types; all mean an unreadable file.
                except Exception as error:
                    hint = "" if self.kind == "parquet" else _AS_TEXT
                    if self.kind == "csv" and _is_tsv(path):
                        hint = (
                            f"`data.source=quoted_tsv` if cells are in quotation marks, or {hint}"
                        )
                    got = f"{place} ({reason_of(error)})"
                    raise InputError(self.field, got, _EXPECTED[self.kind], hint) from error

    def _records(self, path: str) -> Iterator[Mapping[str, object]]:
        match self.kind:
            case "json":
                return iter(_json_rows(path, self.encoding_errors))
            case "parquet":
                return _parquet_rows(path, self.column)
        raise ValueError(f"no conversations in {self.kind}")

    def _texts(self, path: str) -> Iterator[object]:
        match self.kind:
            case "json":
                return _json_texts(path, self.column, self.encoding_errors)
            case "csv" | "quoted_tsv":
                return _csv_texts(path, self.column, self.kind == "quoted_tsv")
        return _parquet_texts(path, self.column)


def open_table(
    kind: Kind,
    field: str,
    spec: str,
    text_column: str,
    join_rows: bool,
    walk: Callable[[frozenset[str]], Walk] = Walk,
    encoding_errors: str = "strict",
) -> Table:
    """Finds the files of a table source; reads none.

    Args:
        kind: the format to parse, regardless of file names.
        field: the configuration field that holds `spec`, for messages.
        spec: as in `paths.find_files`; an item with "://" is a URL.
        text_column: the column to read.
        join_rows: whether to join the rows as the lines of one document.
        walk: makes the `paths.Walk` for the suffixes of `kind`.
        encoding_errors: as in `Table`.

    Raises:
        InputError: a file does not exist or cannot be read.
    """
    items: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    parts = [part.strip() for part in spec.split(",")] if "://" in spec else [spec]
    for remote, group in itertools.groupby(filter(None, parts), lambda part: "://" in part):
        if remote:
            items += ((masked(url), url) for url in group)
            continue
        found = find_files(field, ",".join(group), walk(SUFFIXES[kind]))
        items += ((name, os.path.abspath(path)) for name, path in found.files)
        skipped += found.skipped
    if not items:
        raise InputError(field, spec, "a file, a directory, a glob or a URL")
    value = masked(spec)
    return Table(kind, field, value, items, text_column, join_rows, encoding_errors, skipped)


class _BadLine(Exception):
    def __init__(self, line: int, message: str, hint: str = ""):
        super().__init__(message)
        self.line, self.hint = line, hint


# Not `datasets`: it infers column types (dates become timestamps, and one number far into a text
# column turns the strings beside it into quoted JSON), leaves files open, and does not report the
# invalid line.
def _json_texts(path: str, column: str, errors: str) -> Iterator[object]:
    rows = _json_rows(path, errors)
    seen: set[str] = set()
    found = False
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        # Single rows may lack the column, but not a whole first batch.
        found = found or any(has_column(row, column) for row in batch)
        if not found:
            seen.update(*batch)
            raise missing_column(column, seen, _AS_TEXT, batch)
        for row in batch:
            value = value_at(row, column)
            yield undecoded(value) if isinstance(value, str) and errors != "strict" else value


def _json_rows(path: str, errors: str) -> Iterator[dict[str, object]]:
    """Yields the objects of JSON lines, or of one array or multi-line object."""
    first = True
    with open_file(Path(path)) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            text = line.strip()
            if not text:
                continue
            if first and (text.startswith(b"[") or text == b"{"):
                document = _parse(number, line + file.read(), errors)
                for row in document if isinstance(document, list) else [document]:
                    yield _object(number, row)
                return
            first = False
            yield _object(number, _parse(number, text, errors))


def _parse(line: int, data: bytes, errors: str) -> object:
    try:
        return json.loads(data.decode(errors="strict" if errors == "strict" else "surrogateescape"))
    except json.JSONDecodeError as error:
        message = f"{error.msg} at column {error.colno}"
        raise _BadLine(line + error.lineno - 1, message) from None
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} is not UTF-8"
        hint = "`data.encoding_errors=replace` or `data.encoding_errors=skip`, "
        raise _BadLine(line + data.count(b"\n", 0, error.start), where, hint) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number too long
        raise _BadLine(line, reason_of(error)) from None


def _object(line: int, value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    raise _BadLine(line, f"{type(value).__name__}, not an object")


def _is_tsv(path: str) -> bool:
    return inner_suffix(Path(path)) == ".tsv"


def _csv_texts(path: str, column: str, quoted_tsv: bool) -> Iterator[object]:
    """Yields the cells of a column.

    Quotation marks have a meaning in CSV and in a quoted TSV. In other TSV they are text: a cell
    cannot hold a tab or a line break there.
    """
    import pandas  # lazy: slow to import; a dependency of `datasets`

    tabs = quoted_tsv or _is_tsv(path)
    options: dict[str, Any] = {
        "sep": "\t" if tabs else ",",
        "quoting": csv.QUOTE_NONE if tabs and not quoted_tsv else csv.QUOTE_MINIMAL,
        "dtype": object,  # `str` cannot hold the bytes that are not UTF-8
        "na_filter": False,
        "encoding_errors": "surrogateescape",
    }
    # Read apart, since pandas renames the second column of a name.
    with open_file(Path(path)) as file:
        # `open_file` returns buffered readers, whose `peek` the type IO lacks: hence the ignore.
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
            raise ValueError("UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts it")
        header = pandas.read_csv(file, header=None, nrows=1, **options).iloc[0].tolist()
    at: int | None = None
    with open_file(Path(path)) as file, pandas.read_csv(file, chunksize=_CSV_ROWS, **options) as t:
        for chunk in t:
            # pandas turns unnamed extra cells into the index.
            if not isinstance(chunk.index, pandas.RangeIndex):
                raise ValueError("rows have more cells than the header")
            if at is None:
                at = _position(header, column, chunk.head(SAMPLE_ROWS).values.tolist())
                if tabs and not quoted_tsv:
                    _warn_of_quotes(path, chunk.iloc[:, at].tolist())
            yield from map(undecoded, chunk.iloc[:, at].tolist())


def _position(header: list[str], column: str, rows: list[list[str]]) -> int:
    """The index of a column in the header; blanks around a name are ignored."""
    if column not in header:
        stripped = [name.strip() for name in header]
        if column not in stripped:
            sample = [dict(zip(header, row, strict=False)) for row in rows]
            raise missing_column(column, header, _AS_TEXT, sample)
        header = stripped
    if header.count(column) > 1:
        raise _ambiguous(column, header)
    return header.index(column)


def _ambiguous(column: str, columns: list[str]) -> InputError:
    expected = f"a column name that occurs once, not {columns.count(column)} times"
    return InputError("data.text_column", column, expected)


def _warn_of_quotes(path: str, cells: list[str]) -> None:
    quoted = sum(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)
    if 2 * quoted > len(cells):
        said = (
            "data: %s: most cells are in quotation marks, which are kept; "
            "--config.data.source=quoted_tsv removes them"
        )
        logger.warning(said, path)


def _parquet_texts(path: str, column: str) -> Iterator[object]:
    import pyarrow
    from pyarrow import compute, parquet

    with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        names = file.schema_arrow.names
        top, *inner = [column] if column in names else column.split(".")
        if top not in names or (inner and not _has_field(file.schema_arrow.field(top).type, inner)):
            raise missing_column(column, names, "", _text_sample(file))
        if names.count(top) > 1:
            raise _ambiguous(top, names)
        for batch in file.iter_batches(BATCH_ROWS, columns=[".".join([top, *inner])]):
            values = batch.column(0)
            for name in inner:
                values = compute.struct_field(values, name)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
                values = values.cast(pyarrow.large_binary())  # Parquet does not check UTF-8
            yield from values.to_pylist()


def _parquet_rows(path: str, column: str) -> Iterator[Mapping[str, object]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        columns = conversation_columns(file.schema_arrow.names, column)
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()


def _has_field(kind: Any, path: list[str]) -> bool:
    import pyarrow

    for name in path:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return False
        kind = kind.field(name).type
    return True


def _text_sample(file: Any) -> list[dict[str, object]]:
    """Some rows with their text columns alone; others may hold images."""
    import pyarrow

    def names(fields: Any, prefix: str) -> Iterator[str]:
        for field in fields:
            if pyarrow.types.is_string(field.type):
                yield prefix + field.name
            elif pyarrow.types.is_struct(field.type):
                yield from names(field.type, f"{prefix}{field.name}.")

    texts = list(names(file.schema_arrow, ""))
    try:
        batch = next(iter(file.iter_batches(SAMPLE_ROWS, columns=texts)), None)
        return batch.to_pylist() if batch is not None else []
    except (OSError, UnicodeError, ValueError):  # damaged: only the hint is lost
        return []
