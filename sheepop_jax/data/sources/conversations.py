"""Rows that are conversations: each becomes one document, the JSON of its messages.

A row has `messages` (objects with `role` and `content`), `conversations` (objects with `from` and
`value`, as ShareGPT's), or the texts `prompt` and `completion`.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.errors import InputError

logger = logging.getLogger(__name__)

_LISTS = ("messages", "conversations")
_PAIR = ("prompt", "completion")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_KEYS = (("role", "content"), ("from", "value"))  # of one message
_DEFAULT_COLUMN = "text"  # of `data.text_column`, which then names no column of conversations
_EXPECTED = "a conversation: texts by system, user and assistant, one by the assistant at least"
_SKIP = "`data.broken_rows=skip`"


class Rows(Protocol):
    """A source of rows, such as `tables.Table`; see `documents.Corpus` for the rest."""

    field: str
    value: str
    skipped: Counter[str]
    num_bytes: int

    def signature(self) -> str: ...

    def records(self) -> Iterator[tuple[str, Mapping[str, object], bool]]:
        """Yields the id of each row, its columns, and whether it is for validation."""
        ...


class Conversations:
    """The conversations in rows; see `documents.Corpus`."""

    def __init__(self, rows: Rows, column: str, broken_rows: str):
        """Args:
        rows: the source.
        column: the column of the messages; "text" finds it by the names above.
        broken_rows: "error" or "skip", for rows that hold no conversation.
        """
        self.field, self.value, self.skipped = rows.field, rows.value, rows.skipped
        self.num_bytes = rows.num_bytes
        self._rows, self._column, self._broken_rows = rows, column, broken_rows

    def signature(self) -> str:
        signature = self._rows.signature()
        return f"{signature} chat 1 {self._broken_rows}" if signature else ""

    def __iter__(self) -> Iterator[Document]:
        said = False
        for name, row, is_val in self._rows.records():
            if not said and (columns := _columns_of(row, self._column)):
                logger.info("data: %s: conversations in %s", self.value, " and ".join(columns))
                said = True
            yield Document(name, self._pieces(name, row), is_val, whole=True)

    def _pieces(self, name: str, row: Mapping[str, object]) -> Iterator[str]:
        try:
            messages = messages_of(row, self._column)
        except _Broken as error:
            if self._broken_rows == "skip":
                raise SkipDocument("broken rows") from None
            raise InputError(self.field, f"{name} ({error})", _EXPECTED, _SKIP) from None
        yield to_json(messages)


class _Broken(Exception):
    """A row that holds no conversation; the argument says why."""


Messages = list[dict[str, str]]


def to_json(messages: Messages) -> str:
    """The document of a conversation."""
    pairs = [[message["role"], message["content"]] for message in messages]
    return json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))


def from_json(document: str) -> Messages:
    """The messages, each with `role` and `content`, of a document of `to_json`."""
    return [{"role": role, "content": content} for role, content in json.loads(document)]


def conversation_columns(names: Sequence[str], column: str) -> list[str]:
    """Those of a table's columns that may hold conversations.

    Raises:
        InputError: there is none.
    """
    known = (*_LISTS, *_PAIR) if column == _DEFAULT_COLUMN else (column,)
    if found := [name for name in names if name in known]:
        return found
    expected = f"a column {' or '.join(known[:2])} (columns: {', '.join(sorted(names))})"
    hint = "`data.text_column` for another column of messages"
    raise InputError("data.text_column", column, expected, hint)


def messages_of(row: Mapping[str, object], column: str) -> Messages:
    """The messages of a row.

    Raises:
        _Broken: it holds no conversation.
    """
    columns = _columns_of(row, column)
    if not columns:
        raise _Broken(f"columns {', '.join(sorted(row)) or '(none)'}")
    if columns == _PAIR:
        pairs: list[tuple[object, object]] = [
            ("user", row[_PAIR[0]]),
            ("assistant", row[_PAIR[1]]),
        ]
    else:
        turns = row[columns[0]]
        if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
            raise _Broken(f"{columns[0]} holds {type(turns).__name__}, not a list")
        pairs = [_pair(number, turn) for number, turn in enumerate(turns, 1)]
    messages = []
    for number, (role, content) in enumerate(pairs, 1):
        if not isinstance(role, str) or role not in _ROLES:
            raise _Broken(f"message {number} has the role {role!r}")
        if not isinstance(content, str) or not content.strip():
            kind = "no text" if isinstance(content, str) else type(content).__name__
            raise _Broken(f"message {number}, by {_ROLES[role]}, holds {kind}")
        messages.append({"role": _ROLES[role], "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise _Broken("no message by the assistant")
    return messages


def _columns_of(row: Mapping[str, object], column: str) -> tuple[str, ...]:
    if column != _DEFAULT_COLUMN:
        return (column,) if row.get(column) is not None else ()
    for name in _LISTS:
        if row.get(name) is not None:
            return (name,)
    return _PAIR if all(row.get(name) is not None for name in _PAIR) else ()


def _pair(number: int, turn: object) -> tuple[object, object]:
    if isinstance(turn, Mapping):
        for role, content in _KEYS:
            if role in turn:
                return turn[role], turn.get(content)
    raise _Broken(f"message {number} has no role")
