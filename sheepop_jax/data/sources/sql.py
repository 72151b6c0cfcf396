"""Rows of a SQLite file or a PostgreSQL database, one document each, streamed read-only.

The query is sent verbatim: `:` and `%` are not placeholders.
"""

import contextlib
import logging
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sheepop_jax.data.sources.documents import Document, SkipDocument
from sheepop_jax.data.sources.paths import export_of, signature_of
from sheepop_jax.data.sources.rows import REPAIR, Decoder, missing_column
from sheepop_jax.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine
    from sqlalchemy.exc import DBAPIError

logger = logging.getLogger(__name__)

_FIELD = "data.path"
_ROWS_AT_ONCE = 100  # rows in memory
_CONNECT_SECONDS = 5
_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_EXPECTED = "a SQLite file or a URL sqlite:///FILE or postgresql://USER@HOST/DATABASE"
# SQLite error names that concern the query; all others concern the file.
_SQLITE_QUERY_ERRORS = (
    "SQLITE_ERROR",
    "SQLITE_READONLY",
    "SQLITE_AUTH",
    "SQLITE_TOOBIG",
    "SQLITE_MISMATCH",
)
_COMMENT_OR_QUOTED = re.compile(
    r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*" """.strip(), re.DOTALL
)
_INNERMOST_PARENTHESES = re.compile(r"\([^()]*\)")


class Sql:
    """The rows of a query; see `documents.Corpus`.

    Rows keep the database's order. Reading a row's text raises `SkipDocument` if it is NULL and
    `InputError` if it is not text.
    """

    def __init__(
        self, value: str, database: "Path | URL", query: str, text_column: str, errors: str
    ):
        """`errors`: "strict", "replace" or "skip", for text that is not valid UTF-8."""
        self.field, self.value, self.skipped = _FIELD, value, Counter[str]()
        self.num_bytes = 0
        self._database, self._query, self._column = database, query, text_column
        self._decoder = Decoder(_FIELD, errors)
        self._raw = False  # whether the server sends and gets bytes as Latin-1

    def signature(self) -> str:
        """See `documents.Corpus`; "" for a server, whose rows may change unnoticed.

        Queries that depend on random() or on the time are not detected.
        """
        if not isinstance(self._database, Path):
            return ""
        # The write-ahead log holds changes not yet in the file; reading may leave an empty one.
        log = Path(f"{self._database}-wal")
        logs = [log] if log.is_file() and log.stat().st_size else []
        return signature_of([self._database, *logs], ("sql", 1, self._query, self._column))

    def __iter__(self) -> Iterator[Document]:
        """Yields a document per row.

        Raises:
            InputError: the connection or the query fails, the query would write, or the column
                does not exist.
        """
        from sqlalchemy.exc import DBAPIError

        # yield_per implies stream_results: a server-side cursor, and no more rows in memory.
        options = {"yield_per": _ROWS_AT_ONCE, "no_parameters": True}
        connected = False
        try:
            with _engine(self._database).connect() as connection, contextlib.ExitStack() as stack:
                connected = True
                stack.callback(self._decoder.report)
                self._accept_any_bytes(connection)
                query = self._query.encode().decode("latin-1") if self._raw else self._query
                result = connection.execution_options(**options).exec_driver_sql(query)
                stack.callback(result.close)
                if not result.returns_rows:
                    expected = "a query that returns rows, such as SELECT"
                    raise InputError("data.query", self._query, expected)
                columns = list(result.keys())
                if self._raw:
                    columns = [name.encode("latin-1").decode(errors="replace") for name in columns]
                column = self._index(columns)
                for number, row in enumerate(result, start=1):
                    yield Document(f"row {number}", self._text(number, row[column]))
        except DBAPIError as error:
            raise self._explain(error, connected) from error

    def _accept_any_bytes(self, connection: "Connection") -> None:
        """Lets PostgreSQL send text that is not UTF-8; only SQL_ASCII databases can hold it.

        Those convert nothing, so that Latin-1, in which a character is a byte, carries any bytes.
        """
        if self._decoder.errors == "strict" or isinstance(self._database, Path):
            return
        self._raw = connection.exec_driver_sql("SHOW server_encoding").scalar() == "SQL_ASCII"
        if self._raw:
            connection.exec_driver_sql("SET client_encoding TO 'LATIN1'")

    def _index(self, columns: list[str]) -> int:
        if self._column not in columns:
            raise missing_column(self._column, columns)
        if columns.count(self._column) != 1:
            expected = f"one of the query's columns: {', '.join(columns)}"
            raise InputError("data.text_column", self._column, expected)
        return columns.index(self._column)

    def _text(self, number: int, value: object) -> Iterator[str]:
        if value is None:
            raise SkipDocument("rows without text")
        if self._raw and isinstance(value, str):
            value = bytearray(value, "latin-1")
        if isinstance(value, bytearray):
            value = self._decoder.text(f"row {number}", bytes(value))
        if not isinstance(value, str):
            got = f"{self._column} (row {number} holds {type(value).__name__})"
            cast = f"CAST({self._column} AS TEXT) AS {self._column} in the query"
            if isinstance(value, bytes) and not isinstance(self._database, Path):
                cast = f"convert_from({self._column}, 'UTF8') AS {self._column} in the query"
            raise InputError("data.text_column", got, "a text column", cast)
        yield value

    def _explain(self, error: "DBAPIError", connected: bool) -> InputError:
        """Wraps the database's message in an error that names the field at fault."""
        cause = error.orig
        reason = " ".join(str(cause).split())[:400]
        if isinstance(self._database, Path):
            name = getattr(cause, "sqlite_errorname", "")
            # Errors of Python's sqlite3 module (two statements, a placeholder) have no name.
            misused = isinstance(cause, sqlite3.ProgrammingError | sqlite3.Warning)
            about_query = name in _SQLITE_QUERY_ERRORS or misused
            expected, hint = "a readable SQLite database with UTF-8 text", ""
        else:
            # SQLSTATE 08: connection error; 57P: server shutdown; none: connection lost.
            state = getattr(cause, "sqlstate", None) or ""
            about_query = connected and bool(state) and not state.startswith(("08", "57P"))
            expected = "a reachable PostgreSQL server"
            hint = "checking the address; a password goes into PGPASSWORD or ~/.pgpass"
        if about_query:
            expected = f"a SELECT that the database can run ({reason})"
            # SQLSTATE 22021: text that is not UTF-8.
            hint = REPAIR if getattr(cause, "sqlstate", "") == "22021" else ""
            return InputError("data.query", self._query, expected, hint)
        return InputError(_FIELD, f"{self.value} ({reason})", expected, hint)


def open_sql(path: str, query: str, text_column: str, encoding_errors: str = "strict") -> Sql:
    """Opens a query; reads nothing and does not connect.

    Args:
        path: a SQLite file, or a SQLite or PostgreSQL URL.
        query: a SELECT statement.
        text_column: the column with the text.
        encoding_errors: "strict", "replace" or "skip", for text that is not valid UTF-8.

    Raises:
        InputError: a package is not installed, the file does not exist, the database is of another
            kind, the URL holds a password, or `query` is empty.
    """
    try:
        import sqlalchemy  # noqa: F401  check that it is installed
    except ImportError:
        raise _missing("sqlalchemy") from None
    database = _parse(path)
    if not isinstance(database, Path):
        try:
            import psycopg  # noqa: F401  check that it is installed
        except ImportError:
            raise _missing("psycopg") from None
    if not query.strip():
        hint = "`data.query='SELECT text FROM documents ORDER BY id'`"
        raise InputError("data.query", query, "a SELECT statement", hint)
    if not _ordered(query):
        logger.warning(
            "data.query has no ORDER BY: the row order, and with it the data, may differ between "
            "runs"
        )
    return Sql(path, database, query, text_column, encoding_errors)


def _parse(path: str) -> "Path | URL":
    """Parses `path` into a SQLite file or a server URL."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, mark, _ = path.partition("://")
    if not mark:
        return _existing(path)
    # Print only the scheme until the rest is known to hold no password.
    if scheme.lower() not in _DRIVERS:
        raise InputError(_FIELD, f"{scheme}://", _EXPECTED, export_of(scheme))
    try:
        url = make_url(path).set(drivername=_DRIVERS[scheme.lower()])
    except (ArgumentError, ValueError):
        raise InputError(_FIELD, f"{scheme}://... (not a valid URL)", _EXPECTED) from None
    secret = any(word in name.lower() for name in url.query for word in ("password", "secret"))
    if url.password is not None or secret:
        expected = "a URL without a password (the configuration is saved with the run)"
        hint = "the environment variable PGPASSWORD, or ~/.pgpass"
        raise InputError(_FIELD, f"a {scheme}:// URL with a password", expected, hint)
    if url.drivername != "sqlite":
        return url
    if not url.database or url.host or url.query:
        raise InputError(_FIELD, path, "sqlite:///FILE, with three slashes and no options")
    return _existing(url.database)


def _existing(path: str) -> Path:
    file = Path(os.path.expanduser(path))
    if os.path.isfile(file):
        return file
    problem = " (a directory)" if os.path.isdir(file) else ""
    raise InputError(_FIELD, path + problem, f"an existing file: {_EXPECTED}")


def _engine(database: "Path | URL") -> "Engine":
    """An engine with read-only connections that are closed after use."""
    import sqlalchemy

    if isinstance(database, Path):
        # mode=ro also keeps SQLite from creating a missing file. as_uri() quotes the path.
        uri = f"{database.absolute().as_uri()}?mode=ro"
        return sqlalchemy.create_engine(
            "sqlite://",
            creator=lambda: _prepared(sqlite3.connect(uri, uri=True)),
            poolclass=sqlalchemy.NullPool,
        )
    # Override the user's PGCLIENTENCODING, which may lack characters of the text.
    arguments: dict[str, str | int] = {"client_encoding": "utf8"}
    if "connect_timeout" not in database.query:
        arguments["connect_timeout"] = _CONNECT_SECONDS
    return sqlalchemy.create_engine(
        database,
        connect_args=arguments,
        poolclass=sqlalchemy.NullPool,
        execution_options={"postgresql_readonly": True},
    )


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Denies ATTACH, since mode=ro covers only the main file; text may be invalid UTF-8."""

    def text(content: bytes) -> str | bytearray:  # a BLOB is bytes
        try:
            return content.decode()
        except UnicodeDecodeError:
            return bytearray(content)

    connection.text_factory = text

    def allow(action: int, *about: str | None) -> int:
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK

    connection.set_authorizer(allow)
    return connection


def _ordered(query: str) -> bool:
    """Whether the query has an ORDER BY outside parentheses."""
    bare = _COMMENT_OR_QUOTED.sub(" ", query)
    while (fewer := _INNERMOST_PARENTHESES.sub(" ", bare)) != bare:
        bare = fewer
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def _missing(package: str) -> InputError:
    hint = "pip install -r requirements/extras.txt"
    return InputError("data.source", "sql", f"the Python package {package}", hint)
