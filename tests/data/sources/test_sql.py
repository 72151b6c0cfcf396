"""SQLite files and a PostgreSQL server of the tests' own: rows, and queries that are refused."""

import contextlib
import hashlib
import os
import pwd
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from sheepop_jax.data.sources import sql
from sheepop_jax.data.sources.documents import SkipDocument
from sheepop_jax.data.sources.sql import open_sql
from sheepop_jax.errors import InputError

QUERY = "SELECT id, body FROM notes ORDER BY id"
ROWS = [(1, "one"), (2, "two\n lines\t🐑"), (3, None), (4, ""), (5, "5%: a 'quote'?")]
READ = [
    ("row 1", "one"),
    ("row 2", "two\n lines\t🐑"),
    ("row 3", "[rows without text]"),
    ("row 4", ""),
    ("row 5", "5%: a 'quote'?"),
]


def read(
    path, query: str = QUERY, column: str = "body", errors: str = "strict"
) -> list[tuple[str, str]]:
    """Ids and texts, or the reason to skip in brackets."""
    found = []
    for document in open_sql(str(path), query, column, errors):
        try:
            found.append((document.id, "".join(document.pieces)))
        except SkipDocument as skip:
            found.append((document.id, f"[{skip}]"))
    return found


def refusal(path, query: str = QUERY, column: str = "body") -> str:
    with pytest.raises(InputError) as caught:
        read(path, query, column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "notes.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE notes (id INTEGER, body TEXT)")
        connection.executemany("INSERT INTO notes VALUES (?, ?)", ROWS)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- SQLite --------------------------------------------------------------------------------------


def test_rows_of_a_sqlite_file(database, monkeypatch):
    assert read(database) == READ
    assert read(f"sqlite:///{database}") == READ
    monkeypatch.chdir(database.parent)
    assert read("notes.db") == read("sqlite:///notes.db") == READ
    monkeypatch.setenv("HOME", str(database.parent))
    assert read("~/notes.db") == READ
    corpus = open_sql("notes.db", QUERY, "body")
    assert (corpus.field, corpus.value, corpus.skipped) == ("data.path", "notes.db", {})
    assert [document.id for document in corpus] == [document.id for document in corpus]


@pytest.mark.parametrize("name", ["a b.db", "what?.db", "a#b.db", "50%20.db", "é&mode=rwc.db"])
def test_any_file_name_is_opened_and_read_only(database, name):
    path = database.rename(database.parent / name)
    before = digest(path)
    assert read(path) == READ
    assert "readonly" in refusal(path, "DELETE FROM notes RETURNING body")
    assert digest(path) == before
    assert os.listdir(path.parent) == [name]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO notes VALUES (6, 'six')",
        "UPDATE notes SET body = ''",
        "DELETE FROM notes",
        "DROP TABLE notes",
        "CREATE TABLE more (id)",
        "SELECT body FROM notes; DELETE FROM notes",
    ],
)
def test_a_statement_that_writes_fails_and_writes_nothing(database, statement):
    before = digest(database)
    assert refusal(database, statement).startswith("data.query: got ")
    assert digest(database) == before


@pytest.mark.parametrize("statement", ["ATTACH '{}' AS other", "VACUUM INTO '{}'"])
def test_no_other_database_is_written_either(database, tmp_path, statement):
    other = tmp_path / "other.db"
    said = refusal(database, statement.format(other))
    assert said.startswith("data.query: got ") and "authoriz" in said
    assert not other.exists()


def test_the_query_goes_to_the_database_as_it_stands(database):
    """`:name` and `%` would be placeholders to SQLAlchemy or a driver."""
    assert read(
        database, "SELECT ':a %s %(b)s ' || body AS body FROM notes WHERE body LIKE '5%:%'"
    ) == [("row 1", ":a %s %(b)s 5%: a 'quote'?")]
    assert read(database, f"{QUERY} LIMIT 1; -- the end") == READ[:1]
    assert refusal(database, "SELECT body FROM notes WHERE id = ?").startswith("data.query: ")


@pytest.mark.parametrize(
    ("query", "column", "message"),
    [
        ("SELEC body", "body", "data.query: got 'SELEC body'; expected a SELECT that the database"),
        ("SELECT body FROM nots", "body", "no such table: nots"),
        ("SELECT boddy FROM notes", "body", "no such column: boddy"),
        (" \n", "body", r"data.query: got ' \n'; expected a SELECT statement; try `data"),
        ("BEGIN", "body", "expected a query that returns rows"),
        (QUERY, "text", "data.text_column: got 'text'; expected one of the columns "
         "body, id"),
        ("SELECT body FROM notes", "", "data.text_column: got ''; expected one of the"),
        ("SELECT body, body FROM notes", "body", "columns: body, body"),
        (QUERY, "id", "got 'id (row 1 holds int)'; expected a text column; "
         "try CAST(id AS TEXT)"),
        ("SELECT CAST(body AS BLOB) b FROM notes", "b", "got 'b (row 1 holds bytes)'"),
        ("SELECT 1.5 AS f", "f", "row 1 holds float"),
        ("SELECT 'x' AS b", "text", "; try `data.text_column=b`"),
        ("SELECT CAST(x'61ff' AS TEXT) AS t", "t", "data.path: got 'row 1 (byte 0xff at offset 1 "
         "is not UTF-8)'; expected UTF-8 text; try `data.encoding_errors=replace` or"),
        ("SELECT CAST(x'eda080' AS TEXT) AS t", "t", "byte 0xed at offset 0"),
    ],
)  # fmt: skip  # a case a row
def test_bad_queries_and_columns(database, query, column, message):
    assert message in refusal(database, query, column)


def test_bad_bytes_are_replaced_or_skipped_by_choice(database, caplog):
    query = "SELECT CAST(x'61ff' AS TEXT) AS t UNION ALL SELECT 'ok' UNION ALL SELECT x'62'"
    rows = open_sql(str(database), f"{query} ORDER BY 1", "t", "replace")
    assert ["".join(d.pieces) for d, _ in zip(rows, range(2), strict=False)] == ["a\ufffd", "ok"]
    with pytest.raises(InputError, match=r"row 3 holds bytes"):  # a BLOB is no text
        read(database, f"{query} ORDER BY 1", "t", "replace")
    assert "1 invalid UTF-8 sequences replaced by U+FFFD" in caplog.text
    query = query.rpartition(" UNION")[0] + " ORDER BY 1"
    skipped = [("row 1", "[rows that are not UTF-8]"), ("row 2", "ok")]
    assert read(database, query, "t", "skip") == skipped


def test_bad_files(tmp_path, database):
    missing = tmp_path / "missing.db"
    assert "missing.db'; expected an existing file" in refusal(missing)
    assert "expected an existing file" in refusal(f"sqlite:///{missing}")
    assert not missing.exists()
    assert "(a directory)" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("no database " * 1000)
    assert refusal(tmp_path / "a.txt").startswith("data.path: got ")
    assert "file is not a database" in refusal(tmp_path / "a.txt")
    assert "existing file" in refusal("")
    assert "existing file" in refusal("a\0b")
    assert "existing file" in refusal("a" * 300)
    for url in ("sqlite://", "sqlite:///", f"sqlite:///file:{database}?mode=rwc&uri=true"):
        assert "three slashes and no options" in refusal(url)
    # The file goes away after it was found.
    corpus = open_sql(str(database), QUERY, "body")
    database.unlink()
    with pytest.raises(InputError, match=r"^data\.path: .*unable to open database file"):
        list(corpus)
    assert not database.exists()


def test_sqlite_rows_are_streamed(database):
    """The query fails in its last row; the first come all the same."""
    query = """WITH RECURSIVE t(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM t LIMIT 20000)
        SELECT CAST(abs(-9223372036854775807 - n / 20000) AS TEXT) AS text FROM t"""
    rows = iter(open_sql(str(database), query, "text"))
    assert [next(rows).id for _ in range(1000)][-1] == "row 1000"
    with pytest.raises(InputError, match=r"^data\.query: .*integer overflow"):
        list(rows)


def test_the_signature_follows_the_file_its_log_and_the_query(database, monkeypatch):
    late = time.time() + 100
    assert open_sql(str(database), QUERY, "body").signature() == "", "may still change"
    monkeypatch.setattr(time, "time", lambda: late)

    def signature(query=QUERY, column="body"):
        return open_sql(str(database), query, column).signature()

    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.commit()
    seen = [signature(), signature(QUERY + ", body"), signature(column="id")]
    read(database)  # leaves an empty log
    assert signature() == seen[0]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        with connection:
            connection.execute("INSERT INTO notes VALUES (6, 'six')")
        seen.append(signature())
        assert read(database)[-1] == ("row 6", "six")
    os.utime(database, (1, 1))
    seen.append(signature())
    assert len(set(seen)) == 5 and all(seen)


@pytest.mark.parametrize(
    ("query", "warned"),
    [
        ("SELECT body FROM notes", True),
        ("SELECT body FROM notes ORDER BY id", False),
        ("select body from notes order\n  by id limit 3", False),
        ("SELECT body FROM (SELECT (1), body FROM notes ORDER BY id)", True),
        ("SELECT body, row_number() OVER (ORDER BY id) FROM notes", True),
        ("SELECT body FROM notes -- ORDER BY id", True),
        ("SELECT body FROM notes /* ORDER\n BY id */", True),
        ("SELECT body FROM notes WHERE body <> 'it''s ORDER BY id'", True),
        ("SELECT ')' || body AS body FROM notes WHERE body <> '(' ORDER BY id", False),
    ],
)
def test_rows_without_an_order_are_warned_of_once(database, caplog, query, warned):
    read(database, query)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warned
    assert all("no ORDER BY" in message for message in messages)


# --- URLs and packages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:Secr3t@localhost/db",
        "postgres://me:Se/cr3t@localhost:99/db",
        "postgresql://me:x@Secr3t@localhost/db",
        "postgresql://me:Secr3t@localhost:port/db",
        "postgresql://localhost/db?password=Secr3t",
        "postgresql://localhost/db?sslpassword=Secr3t",
        "postgresql://localhost/db?oauth_client_secret=Secr3t",
        "sqlite://me:Secr3t@/a.db",
        "mysql://me:Secr3t@localhost/db",
        "postgres ql://me:Secr3t@localhost/db",
    ],
)
def test_a_password_is_refused_and_never_printed(url, caplog):
    with pytest.raises(InputError) as caught:
        open_sql(url, QUERY, "body")
    assert str(caught.value).startswith("data.path: ")
    assert "cr3t" not in str(caught.value) + caplog.text
    assert "cr3t" not in "".join(traceback.format_exception(caught.value, limit=0))
    if url.startswith(("postgresql://me:S", "sqlite")) and "port" not in url:
        assert "expected a URL without a password (the configuration is saved" in str(caught.value)
        assert str(caught.value).endswith("try the environment variable PGPASSWORD, or ~/.pgpass")


@pytest.mark.parametrize("url", ["mysql://me@localhost/db", "postgresql+asyncpg://h/d", "x://y"])
def test_other_databases_are_refused(url):
    message = refusal(url)
    assert "sqlite:///FILE or postgresql://USER@HOST/DATABASE" in message
    assert f"got '{url.split('//')[0]}//'" in message


def test_missing_packages_are_named(database, monkeypatch):
    line = "expected the Python package {}; try pip install -r requirements/extras.txt"
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert read(database) == READ
    assert line.format("psycopg") in refusal("postgresql://localhost/db")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    assert refusal(database) == f"data.source: got 'sql'; {line.format('sqlalchemy')}"


# --- PostgreSQL ----------------------------------------------------------------------------------


def _program(name: str) -> str:
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/local/bin")]
    found = shutil.which(name) or next((str(p / name) for p in places if (p / name).exists()), "")
    return found or pytest.skip(f"no {name} on this machine, so no PostgreSQL server to test with")


def _account() -> dict[str, object]:
    """PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    return pytest.skip("root, and no other account to run PostgreSQL with")


@pytest.fixture(scope="module")
def server():
    """The URL of a database that holds `notes`, on a server that listens on a socket file alone."""
    initdb, pg_ctl, account = _program("initdb"), _program("pg_ctl"), _account()
    root = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path has to be short
    data = root / "data"

    def run(*command: str) -> None:
        subprocess.run(
            command,
            cwd=root,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=60,
            **account,
        )

    try:
        if account:
            os.chown(root, account["user"], account["group"])
        run(initdb, "-D", str(data), "-A", "trust", "-U", "me", "-E", "UTF8", "--locale=C", "-N")
        rules = data / "pg_hba.conf"
        rules.write_text("local all locked scram-sha-256\n" + rules.read_text())
        options = f"-c listen_addresses= -c unix_socket_directories={root} -c fsync=off"
        run(pg_ctl, "-D", str(data), "-w", "-l", str(root / "log"), "-o", options, "start")
        url = f"postgresql://me@/postgres?host={root}"
        execute(url, "CREATE TABLE notes (id integer, body text)")
        execute(
            url,
            "INSERT INTO notes SELECT * FROM unnest(%s::int[], %s::text[])",
            [list(column) for column in zip(*ROWS, strict=True)],
        )
        yield url
    finally:
        if (data / "postmaster.pid").exists():
            run(pg_ctl, "-D", str(data), "-w", "-m", "immediate", "stop")
        shutil.rmtree(root)


def execute(url: str, statement: str, parameters=None) -> list[tuple]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def test_rows_of_a_server(server):
    assert read(server) == READ
    assert read(server.replace("postgresql://", "postgres://")) == READ
    assert read(server.replace("postgresql://", "postgresql+psycopg://"), QUERY + ";") == READ
    query = "SELECT ':a %s %(b)s ' || body AS body FROM notes WHERE body LIKE '5%:%'"
    assert read(server, query) == [("row 1", ":a %s %(b)s 5%: a 'quote'?")]
    assert open_sql(server, QUERY, "body").signature() == ""


def test_a_server_is_read_and_never_written(server):
    execute(
        server,
        """CREATE OR REPLACE FUNCTION burn() RETURNS text LANGUAGE sql
        AS 'DELETE FROM notes RETURNING body'""",
    )
    for statement in (
        "INSERT INTO notes VALUES (6, 'six')",
        "DELETE FROM notes RETURNING body",
        "WITH gone AS (DELETE FROM notes RETURNING body) SELECT body FROM gone",
        "SELECT burn() AS body",
        "SELECT body FROM notes; COMMIT; DELETE FROM notes",
        "DROP TABLE notes",
    ):
        assert refusal(server, statement).startswith("data.query: got ")
        assert execute(server, "SELECT count(*) FROM notes") == [(len(ROWS),)]
    assert "read-only transaction" in refusal(server, "SELECT burn() AS body")


@pytest.mark.parametrize(
    ("query", "column", "message"),
    [
        ("SELEC body", "body", "data.query: got 'SELEC body'"),
        ("SELECT body FROM nots", "body", 'relation "nots" does not exist'),
        (QUERY, "text", "data.text_column: got 'text'; expected one of the columns "
         "body, id"),
        (QUERY, "id", "row 1 holds int"),
        ("SELECT body::bytea AS b FROM notes", "b", "row 1 holds bytes)'; expected a "
         "text column; try convert_from(b, 'UTF8') AS b"),
        ("SELECT '{\"a\": 1}'::jsonb AS j", "j", "row 1 holds dict"),
    ],
)  # fmt: skip  # a case a row
def test_bad_queries_of_a_server(server, query, column, message):
    assert message in refusal(server, query, column)


def test_server_rows_are_streamed(server):
    """The query fails in its last row; all but the last batch come all the same."""
    query = "SELECT (1 / (20000 - n))::text AS text FROM generate_series(1, 20000) AS n"
    rows = iter(open_sql(server, query, "text"))
    assert [next(rows).id for _ in range(19_850)][-1] == "row 19850"
    (left,) = execute(server, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'FETCH%'")
    assert left == (1,)
    with pytest.raises(InputError, match=r"^data\.query: .*division by zero"):
        list(rows)


def test_a_reader_that_stops_early_leaves_no_connection(server):
    rows = iter(open_sql(server, "SELECT n::text AS t FROM generate_series(1, 20000) AS n", "t"))
    next(rows)
    rows.close()
    count = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%generate_series%' AND pid <> "
    deadline = time.monotonic() + 60
    while execute(server, count + "pg_backend_pid()") != [(0,)]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_connection_that_is_lost_is_one_line(server):
    rows = iter(open_sql(server, "SELECT n::text AS t FROM generate_series(1, 20000) AS n", "t"))
    next(rows)
    execute(
        server,
        """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'""",
    )
    with pytest.raises(
        InputError, match=r"^data\.path: got 'postgresql://.*terminating connection"
    ):
        list(rows)


def test_a_password_comes_from_the_environment(server, monkeypatch):
    execute(server, "CREATE ROLE locked LOGIN PASSWORD 'Secr3t'")
    execute(server, "GRANT SELECT ON notes TO locked")
    url = server.replace("me@", "locked@")
    assert "no password supplied" in refusal(url)
    monkeypatch.setenv("PGPASSWORD", "wrong Secr3t")
    message = refusal(url)
    assert message.startswith("data.path: ") and "authentication failed" in message
    assert "cr3t" not in message
    monkeypatch.setenv("PGPASSWORD", "Secr3t")
    assert read(url) == READ


def test_text_is_asked_for_as_utf8_and_checked(server, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "latin1")
    assert read(server) == READ
    execute(server, "CREATE DATABASE raw TEMPLATE template0 ENCODING 'SQL_ASCII'")
    url = server.replace("/postgres?", "/raw?")
    assert read(url, "SELECT 'é' AS t", "t") == [("row 1", "é")]
    message = refusal(url, "SELECT convert_from('\\xff', 'SQL_ASCII') AS t", "t")
    assert 'invalid byte sequence for encoding "UTF8"' in message
    assert message.endswith("try `data.encoding_errors=replace` or `data.encoding_errors=skip`")
    query = "SELECT convert_from('\\x61ff', 'SQL_ASCII') AS t UNION ALL SELECT 'é'"
    assert read(url, query, "t", "replace") == [("row 1", "a\ufffd"), ("row 2", "é")]
    skipped = [("row 1", "[rows that are not UTF-8]"), ("row 2", "é")]
    assert read(url, query, "t", "skip") == skipped
    assert read(server, QUERY, "body", "replace") == READ


def test_a_server_that_cannot_be_reached(server, monkeypatch):
    """At once where nothing listens, in bounded time where nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"postgresql://me@127.0.0.1:{listener.getsockname()[1]}/db"
        monkeypatch.setattr(sql, "_CONNECT_SECONDS", 2)  # the least that libpq takes
        start = time.monotonic()
        assert "timeout" in refusal(url)
        assert 1 < time.monotonic() - start < 60
        monkeypatch.setattr(sql, "_CONNECT_SECONDS", 600)
        assert "timeout" in refusal(url + "?connect_timeout=2")
        assert time.monotonic() - start < 120
    message = refusal(url)
    assert message.startswith(f"data.path: got '{url} (") and "onnection refused" in message
    assert "a password goes into PGPASSWORD or ~/.pgpass" in message
    assert 'database "nope" does not exist' in refusal(server.replace("/postgres?", "/nope?"))
    assert "invalid connection option" in refusal(server + "&nonsense=1")
