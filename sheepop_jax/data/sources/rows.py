"""Table rows to documents, and the error messages shared by table sources."""

import contextlib
import difflib
import logging
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

BATCH_ROWS = 256
SAMPLE_ROWS = 100  # rows in which to look for the column that the user means
_LONG_TEXT = 20  # characters on average
_MESSAGES = """jq -c '{text: ([.%s[].content] | join("\\n\\n"))}' FILE > rows.jsonl"""
REPAIR = "`data.encoding_errors=replace` or `data.encoding_errors=skip`"


class Decoder:
    """Decodes the texts of rows that may not be valid UTF-8, and counts the changes."""

    def __init__(self, field: str, errors: str, hint: str = ""):
        """Args:
        field: the configuration field of the source, for messages.
        errors: "strict", "replace" or "skip", as in `data.encoding_errors`.
        hint: what else to do about invalid text.
        """
        self._hint = ", or ".join(filter(None, (hint, REPAIR)))
        self.errors = errors
        self._field = field
        self._replaced = self._skipped = 0

    def text(self, name: str, value: str | bytes) -> str:
        """The text of a row; bytes must be UTF-8.

        Raises:
            SkipDocument: the row is to be skipped.
            InputError: the text is invalid.
        """
        if isinstance(value, str):
            return value
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            if self.errors == "replace":
                text = value.decode(errors="replace")
                self._replaced += text.count("\ufffd") - value.count(b"\xef\xbf\xbd")
                return text
            if self.errors == "skip":
                self._skipped += 1
                raise SkipDocument("rows that are not UTF-8") from None
            where = f"byte 0x{value[error.start]:02x} at offset {error.start} is not UTF-8"
            raise InputError(self._field, f"{name} ({where})", "UTF-8 text", self._hint) from None

    def report(self) -> None:
        """Logs the changes since the last report."""
        if self._replaced:
            logger.warning("%d invalid UTF-8 sequences replaced by U+FFFD", self._replaced)
        if self._skipped:
            logger.warning("%d rows skipped that are not UTF-8", self._skipped)
        self._replaced = self._skipped = 0


def undecoded(text: str) -> str | bytes:
    """A text that was decoded with `surrogateescape`: its bytes where they are not UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode(errors="surrogateescape")
        except UnicodeEncodeError:  # half a character, escaped in JSON
            pass
    return text


def rows_to_documents(
    rows: Iterable[tuple[str, object]],
    column: str,
    decoder: Decoder,
    joined: str = "",
    is_val: bool = False,
) -> Iterator[Document]:
    """Yields one document per (id, text), or a single document of joined lines.

    Args:
        rows: (id, text) pairs; bytes are text that is yet to be decoded; a text of None is skipped.
        column: the text column, for messages.
        decoder: for texts in bytes.
        joined: if not "", the id of one document that joins all rows as lines.
        is_val: whether the documents belong to the validation split.

    Raises:
        InputError: a text is neither a string nor None, or it is not UTF-8.
    """
    texts = ((name, _checked(name, column, value)) for name, value in rows)
    try:
        if joined:
            yield Document(joined, _lines(texts, decoder), is_val)
            return
        for name, value in texts:
            if isinstance(value, bytes):
                with contextlib.suppress(UnicodeDecodeError):
                    value = value.decode()
            # Only reading the pieces may skip a document.
            pieces = (value,) if isinstance(value, str) else _pieces(name, value, decoder)
            yield Document(name, pieces, is_val)
    finally:
        decoder.report()


def _pieces(name: str, value: bytes | None, decoder: Decoder) -> Iterator[str]:
    if value is None:
        raise SkipDocument("rows without text")
    yield decoder.text(name, value)


def _lines(texts: Iterable[tuple[str, str | bytes | None]], decoder: Decoder) -> Iterator[str]:
    for name, value in texts:
        if value is None:
            continue
        try:
            line = decoder.text(name, value)
        except SkipDocument:  # counted by the decoder
            continue
        yield line if line.endswith("\n") else line + "\n"


def value_at(row: Mapping[str, object], column: str) -> object:
    """The value of a column, or of a dotted path into nested objects; None if there is none."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return value_at(inner, rest) if rest and isinstance(inner, Mapping) else None


def has_column(row: Mapping[str, object], column: str) -> bool:
    """Whether a row has a column, or a dotted path into nested objects."""
    if column in row:
        return True
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return bool(rest) and isinstance(inner, Mapping) and has_column(inner, rest)


def missing_column(
    column: str,
    columns: Iterable[str],
    hint: str = "",
    rows: Sequence[Mapping[str, object]] = (),
) -> InputError:
    """The error for a column that does not exist; suggests the one that seems to be meant.

    Args:
        column: the configured column.
        columns: those of the table.
        hint: another suggestion.
        rows: some rows, in which to look for text.
    """
    names = sorted(columns)
    known = ", ".join(repr(name) if name != name.strip() else name for name in names) or "(none)"
    near = difflib.get_close_matches(column, names, n=1) or names[: len(names) == 1]
    if len(names) == 1 and set(names[0]) & set(";|\t,"):
        likely = "commas as separators, or tabs in a .tsv file"
    elif f'"{column}"' in names:
        likely = "`data.source=quoted_tsv`"
    elif near and near[0].isidentifier() and not _lists_in(rows, near[0]):
        likely = f"`data.text_column={near[0]}`"
    elif longest := _longest_text(rows):
        likely = f"`data.text_column={shlex.quote(longest)}`"
    else:
        likely = _hint_for_lists(rows, column)
    hint = ", or ".join(filter(None, (likely, hint)))
    return InputError("data.text_column", column, f"one of the columns {known}", hint)


def _longest_text(rows: Sequence[Mapping[str, object]]) -> str:
    """The column, or dotted path, with the longest text on average; "" if no text is long."""
    sizes: dict[str, int] = {}

    def add(row: Mapping[str, object], prefix: str) -> None:
        for name, value in row.items():
            if isinstance(value, Mapping):
                add(value, f"{prefix}{name}.")
            elif isinstance(value, str):
                sizes[prefix + name] = sizes.get(prefix + name, 0) + len(value)

    for row in rows[:SAMPLE_ROWS]:
        add(row, "")
    longest = max(sizes, key=lambda name: sizes[name], default="")
    return longest if longest and sizes[longest] >= _LONG_TEXT * len(rows[:SAMPLE_ROWS]) else ""


def _lists_in(rows: Sequence[Mapping[str, object]], name: str) -> bool:
    return any(isinstance(row.get(name), list) for row in rows[:SAMPLE_ROWS])


def _hint_for_lists(rows: Sequence[Mapping[str, object]], column: str) -> str:
    """How to turn lists of objects into rows or text."""
    for name, value in rows[0].items() if rows else ():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            if has_column(value[0], column) and len(rows) == 1:
                return f"jq -c '.{name}[]' FILE > rows.jsonl"
            if "content" in value[0]:
                return _MESSAGES % name
    return ""


def reason_of(error: Exception) -> str:
    """The first line of a library's message, prefixed by the exception type if that adds detail."""
    said = next(iter(str(error).strip().splitlines()), "")[:300]
    if isinstance(error, OSError | UnicodeError) or not said:
        return getattr(error, "strerror", None) or said or type(error).__name__
    return f"{type(error).__name__}: {said}"


def _checked(name: str, column: str, value: object) -> str | bytes | None:
    if value is None or isinstance(value, str | bytes):
        return value
    hint = ""
    if isinstance(value, Mapping):
        inner = _longest_text([value]) or next((k for k, v in value.items() if type(v) is str), "")
        hint = f"`data.text_column={shlex.quote(f'{column}.{inner}')}`" if inner else ""
    elif isinstance(value, list):
        hint = _MESSAGES % column
    got = f"{column} ({name} holds {type(value).__name__})"
    raise InputError("data.text_column", got, "a text column", hint)
