"""Rows of a SQLite file or a PostgreSQL server: each is a document, streamed, never written.

The query goes to the database as it stands: a `:` or `%` in it is no placeholder.
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
from sheepop_jax.data.sources.paths import signature_of
from sheepop_jax.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine
    from sqlalchemy.exc import DBAPIError

logger = logging.getLogger(__name__)

_FIELD = "data.path"
_ROWS_AT_ONCE = 100  # held in memory
_CONNECT_SECONDS = 5
_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_EXPECTED = "a SQLite file or a URL sqlite:///FILE or postgresql://USER@HOST/DATABASE"
# What SQLite says of the query itself; its other errors are about the file.
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

    Rows come in the database's order. Reading a row's text raises `SkipDocument` if it is NULL,
    `InputError` if it is no text.
    """

    def __init__(self, value: str, database: "Path | URL", query: str, text_column: str):
        self.field, self.value, self.skipped = _FIELD, value, Counter[str]()
        self.num_bytes = 0
        self._database, self._query, self._column = database, query, text_column

    def signature(self) -> str:
        """See `documents.Corpus`; that rows hang on chance or the clock in the query does not show.

        A server cannot tell whether its rows have changed, so it has none.
        """
        if not isinstance(self._database, Path):
            return ""
        # Holds changes that are not in the file yet; reading a file may leave an empty one.
        log = Path(f"{self._database}-wal")
        logs = [log] if log.is_file() and log.stat().st_size else []
        return signature_of([self._database, *logs], ("sql", 1, self._query, self._column))

    def __iter__(self) -> Iterator[Document]:
        """Raises `InputError`: no connection, a query that fails or would write, no such column."""
        from sqlalchemy.exc import DBAPIError

        # yield_per brings stream_results: a cursor on the server, and no more rows at once.
        options = {"yield_per": _ROWS_AT_ONCE, "no_parameters": True}
        connected = False
        try:
            with _engine(self._database).connect() as connection, contextlib.ExitStack() as stack:
                connected = True
                result = connection.execution_options(**options).exec_driver_sql(self._query)
                stack.callback(result.close)
                if not result.returns_rows:
                    expected = "a query that gives rows, such as SELECT"
                    raise InputError("data.query", self._query, expected)
                column = self._index(list(result.keys()))
                for number, row in enumerate(result, start=1):
                    yield Document(f"row {number}", self._text(number, row[column]))
        except DBAPIError as error:
            raise self._explain(error, connected) from error

    def _index(self, columns: list[str]) -> int:
        if columns.count(self._column) != 1:
            expected = f"one of the query's columns: {', '.join(columns)}"
            raise InputError("data.text_column", self._column, expected)
        return columns.index(self._column)

    def _text(self, number: int, value: object) -> Iterator[str]:
        if value is None:
            raise SkipDocument("rows without text")
        if not isinstance(value, str):
            got = f"{self._column} (row {number} holds {type(value).__name__})"
            cast = f"CAST({self._column} AS TEXT) AS {self._column} in the query"
            if isinstance(value, bytes) and not isinstance(self._database, Path):
                cast = f"convert_from({self._column}, 'UTF8') AS {self._column} in the query"
            raise InputError("data.text_column", got, "a column of text", cast)
        yield value

    def _explain(self, error: "DBAPIError", connected: bool) -> InputError:
        """The database's own message, and the field that it is about."""
        cause = error.orig
        reason = " ".join(str(cause).split())[:400]
        if isinstance(self._database, Path):
            name = getattr(cause, "sqlite_errorname", "")
            # It has no name where Python's own module refuses: two statements, a placeholder.
            misused = isinstance(cause, sqlite3.ProgrammingError | sqlite3.Warning)
            about_query = name in _SQLITE_QUERY_ERRORS or misused
            expected, hint = "a readable SQLite database with UTF-8 text", ""
        else:
            # 08: the connection; 57P: the server is being stopped. No state: it is gone.
            state = getattr(cause, "sqlstate", None) or ""
            about_query = connected and bool(state) and not state.startswith(("08", "57P"))
            expected = "a PostgreSQL server that can be reached"
            hint = "the address; a password goes into PGPASSWORD or ~/.pgpass"
        if about_query:
            expected = f"a SELECT that the database can run ({reason})"
            return InputError("data.query", self._query, expected)
        return InputError(_FIELD, f"{self.value} ({reason})", expected, hint)


def open_sql(path: str, query: str, text_column: str) -> Sql:
    """The rows of `query`; nothing is read yet, and no server asked.

    Args:
        path: a SQLite file, or a URL of SQLite or PostgreSQL.
        query: a SELECT.
        text_column: the column with the text.

    Raises:
        InputError: a package is missing, `path` names no such file or another kind of database, a
            URL holds a password, or `query` is empty.
    """
    # Used where the rows are read.
    try:
        import sqlalchemy  # noqa: F401  only whether it is there
    except ImportError:
        raise _missing("sqlalchemy") from None
    database = _parse(path)
    if not isinstance(database, Path):
        try:
            import psycopg  # noqa: F401  only whether it is there
        except ImportError:
            raise _missing("psycopg") from None
    if not query.strip():
        hint = "--config.data.query='SELECT text FROM documents ORDER BY id'"
        raise InputError("data.query", query, "a SELECT statement", hint)
    if not _ordered(query):
        logger.warning(
            "data.query has no ORDER BY: the order of its rows may differ from time to time, and "
            "with it the data"
        )
    return Sql(path, database, query, text_column)


def _parse(path: str) -> "Path | URL":
    """The file, or the URL of a server, that `path` names."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, mark, _ = path.partition("://")
    if not mark:
        return _existing(path)
    # Nothing but the scheme is printed until it is known that no password is in the rest.
    if scheme.lower() not in _DRIVERS:
        raise InputError(_FIELD, f"{scheme}://", _EXPECTED)
    try:
        url = make_url(path).set(drivername=_DRIVERS[scheme.lower()])
    except (ArgumentError, ValueError):
        raise InputError(_FIELD, f"{scheme}://... (not a valid URL)", _EXPECTED) from None
    if url.password is not None or any("password" in name.lower() for name in url.query):
        expected = "a URL without a password (the configuration is saved with the run)"
        hint = "the variable PGPASSWORD or ~/.pgpass"
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
    """An engine whose connections can only read, and are closed when given back."""
    import sqlalchemy

    if isinstance(database, Path):
        # mode=ro also keeps SQLite from making a file that is not there. as_uri() quotes.
        uri = f"{database.absolute().as_uri()}?mode=ro"
        return sqlalchemy.create_engine(
            "sqlite://",
            creator=lambda: _read_only(sqlite3.connect(uri, uri=True)),
            poolclass=sqlalchemy.NullPool,
        )
    # libpq would else take the user's PGCLIENTENCODING, which may lack characters of the text.
    arguments: dict[str, str | int] = {"client_encoding": "utf8"}
    if "connect_timeout" not in database.query:
        arguments["connect_timeout"] = _CONNECT_SECONDS
    return sqlalchemy.create_engine(
        database,
        connect_args=arguments,
        poolclass=sqlalchemy.NullPool,
        execution_options={"postgresql_readonly": True},
    )


def _read_only(connection: sqlite3.Connection) -> sqlite3.Connection:
    """mode=ro is of the main file alone: ATTACH and VACUUM INTO, which attaches, write others."""

    def allow(action: int, *about: str | None) -> int:
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK

    connection.set_authorizer(allow)
    return connection


def _ordered(query: str) -> bool:
    """Whether the query as a whole, and not only a part in parentheses, has an ORDER BY."""
    bare = _COMMENT_OR_QUOTED.sub(" ", query)
    while (fewer := _INNERMOST_PARENTHESES.sub(" ", bare)) != bare:
        bare = fewer
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def _missing(package: str) -> InputError:
    hint = "pip install -r requirements/extras.txt"
    return InputError("data.source", "sql", f"the Python package {package}", hint)
