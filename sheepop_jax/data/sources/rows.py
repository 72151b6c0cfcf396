"""Table rows to documents, and the error messages shared by table sources."""

import difflib
from collections.abc import Iterable, Iterator

from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.errors import InputError

BATCH_ROWS = 256


def rows_to_documents(
    rows: Iterable[tuple[str, object]], column: str, joined: str = "", is_val: bool = False
) -> Iterator[Document]:
    """Yields one document per (id, text), or a single document of joined lines.

    Args:
        rows: (id, text) pairs; a text of None is skipped.
        column: the text column, for messages.
        joined: if not "", the id of one document that joins all rows as lines.
        is_val: whether the documents belong to the validation split.

    Raises:
        InputError: a text is neither a string nor None.
    """
    texts = ((name, _checked(name, column, value)) for name, value in rows)
    if joined:
        lines = (text for _, text in texts if text is not None)
        pieces = (line if line.endswith("\n") else line + "\n" for line in lines)
        yield Document(joined, pieces, is_val)
        return
    for name, text in texts:
        yield Document(name, map(_skip, (None,)) if text is None else (text,), is_val)


def missing_column(column: str, columns: Iterable[str], hint: str = "") -> InputError:
    names = sorted(columns)
    known = ", ".join(names) or "(none)"
    near = difflib.get_close_matches(column, names, n=1) or names[: len(names) == 1]
    if len(names) == 1 and set(names[0]) & set(";|\t,"):
        likely = "commas as separators, or tabs in a .tsv file"
    elif near and near[0].isidentifier():
        likely = f"`data.text_column={near[0]}`"
    else:
        likely = ""
    hint = ", or ".join(filter(None, (likely, hint)))
    return InputError("data.text_column", column, f"one of the columns {known}", hint)


def reason_of(error: Exception) -> str:
    """The first line of a library's message, prefixed by the exception type if that adds detail."""
    said = next(iter(str(error).strip().splitlines()), "")[:300]
    if isinstance(error, OSError | UnicodeError) or not said:
        return getattr(error, "strerror", None) or said or type(error).__name__
    return f"{type(error).__name__}: {said}"


def _checked(name: str, column: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    got = f"{column} ({name} holds {type(value).__name__})"
    raise InputError("data.text_column", got, "a text column")


def _skip(_: None) -> str:
    raise SkipDocument("rows without text")
