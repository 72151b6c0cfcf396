"""Rows of JSONL, CSV and parquet: the documents they give, and what is refused."""

import bz2
import csv
import functools
import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sheepop_jax.data.sources import files, paths, tables, web
from sheepop_jax.data.sources.documents import SkipDocument
from sheepop_jax.data.sources.paths import Walk
from sheepop_jax.data.sources.tables import open_table
from sheepop_jax.errors import InputError

TEXTS = ["one", "", 'two\r\n"quoted", \u2028 \U0001f411\x85', "NA", "007", "1e5", "null", " x "]


def write_json(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return path


def write_csv(path, texts=TEXTS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerows([("id", "text"), *((index, text) for index, text in enumerate(texts))])
    return path


def write_parquet(path, texts=TEXTS):
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)
    return path


WRITERS = {"json": write_json, "csv": write_csv, "parquet": write_parquet}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that closing it waits for them


KINDS = pytest.mark.parametrize("kind", WRITERS)


def read(kind, spec, column="text", join_rows=False, encoding_errors="strict", **options):
    """The documents as (id, text); None where a row has no text."""
    found = []
    walk = functools.partial(Walk, **options)
    table = open_table(kind, "data.path", str(spec), column, join_rows, walk, encoding_errors)
    for document in table:
        try:
            found.append((document.id, "".join(document.pieces)))
        except SkipDocument as reason:
            assert str(reason) == "rows without text"
            found.append((document.id, None))
    return found


def texts_of(*arguments, **options):
    return [text for _, text in read(*arguments, **options)]


def refusal(kind, spec, column="text", **options):
    with pytest.raises(InputError) as caught:
        read(kind, spec, column, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@KINDS
def test_each_row_is_a_document_with_its_text_exactly(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"a.{kind}")
    assert read(kind, path) == [(f"a.{kind}#{i}", text) for i, text in enumerate(TEXTS)]


@KINDS
def test_joined_rows_are_the_lines_of_one_document(tmp_path, kind):
    for name, texts in (("a", ["one", "", "two\n"]), ("b", ["three\n\n", "four"])):
        WRITERS[kind](tmp_path / f"{name}.{kind}", texts)
    expected = "one\n\ntwo\nthree\n\nfour\n"
    assert read(kind, tmp_path, join_rows=True) == [(str(tmp_path), expected)]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rows_without_text_are_skipped(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"a.{kind}", ["one", None, "", "two"])
    assert texts_of(kind, path) == ["one", None, "", "two"]
    assert texts_of(kind, path, join_rows=True) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("kind", ["json", "csv"])
@pytest.mark.parametrize(
    "suffix, compress",
    [(".gz", gzip.compress), (".zst", zstandard.compress), (".bz2", bz2.compress)],
)
def test_compressed(tmp_path, kind, suffix, compress):
    path = WRITERS[kind](tmp_path / f"a.{kind}")
    packed = tmp_path / f"a.{kind}{suffix}"
    packed.write_bytes(compress(path.read_bytes()))
    path.unlink()
    assert texts_of(kind, packed) == TEXTS
    assert texts_of(kind, tmp_path) == TEXTS  # found by its inner suffix


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_all_frames_of_a_compressed_file_are_read(tmp_path, kind):
    data = WRITERS[kind](tmp_path / f"a.{kind}").read_bytes()
    packed = tmp_path / f"b.{kind}.zst"
    packed.write_bytes(zstandard.compress(data[:50]) + zstandard.compress(data[50:]))
    assert texts_of(kind, packed) == TEXTS


@KINDS
def test_directories_globs_and_lists(tmp_path, kind):
    suffix = {"json": "ndjson"}.get(kind, kind)
    WRITERS[kind](tmp_path / f"b.{suffix}", ["b"])
    (tmp_path / "deep").mkdir()
    WRITERS[kind](tmp_path / "deep" / f"a [1]*.{suffix}", ["a"])  # no pattern, but a name
    WRITERS[kind](tmp_path / "other.dat", ["other"])
    assert read(kind, tmp_path) == [(f"b.{suffix}#0", "b"), (f"deep/a [1]*.{suffix}#0", "a")]
    assert texts_of(kind, f"{tmp_path}/**/*.{suffix}") == ["b", "a"]
    assert texts_of(kind, f"{tmp_path}/other.dat, {tmp_path}/deep") == ["other", "a"]
    (tmp_path / "a, b").mkdir()
    assert texts_of(kind, WRITERS[kind](tmp_path / "a, b" / f"c.{suffix}")) == TEXTS
    table = open_table(kind, "data.path", str(tmp_path), "text", join_rows=False)
    assert table.skipped == {".dat files": 1}
    assert "larger than" in refusal(kind, tmp_path, max_file_bytes=1)
    assert "existing file" in refusal(kind, tmp_path / "none")


def test_comma_and_tab_separated_files_mix(tmp_path):
    write_csv(tmp_path / "a.csv", ["one, two\tthree"])
    write_csv(tmp_path / "b.tsv", ["four, five"])
    assert texts_of("csv", tmp_path) == ["one, two\tthree", "four, five"]


class TestQuotationMarks:
    """They have a meaning in CSV, and in TSV only by choice."""

    ROWS = 'id\ttext\n1\t"Hello\n2\tsecond row\n3\t"World"\n4\t""\n5\tsaid "x"\n'

    def test_in_tsv_they_are_text(self, tmp_path, caplog):
        for name, pack in (("a.tsv", bytes), ("b.TSV.gz", gzip.compress)):
            (tmp_path / name).write_bytes(pack(self.ROWS.encode()))
            expected = ['"Hello', "second row", '"World"', '""', 'said "x"']
            assert texts_of("csv", tmp_path / name) == expected
        assert not caplog.records

    def test_by_choice_they_quote_as_in_csv(self, tmp_path, caplog):
        path = write_csv(tmp_path / "a.tsv", [*TEXTS, "tab\tand\nline"])
        assert texts_of("quoted_tsv", path) == [*TEXTS, "tab\tand\nline"]
        assert texts_of("quoted_tsv", tmp_path) == [*TEXTS, "tab\tand\nline"]
        assert not caplog.records

    def test_the_choice_is_pointed_to(self, tmp_path, caplog):
        path = tmp_path / "a.tsv"
        path.write_text('id\ttext\n1\t"one"\n2\t"two"\n3\tthree\n')
        assert texts_of("csv", path) == ['"one"', '"two"', "three"]
        assert "--config.data.source=quoted_tsv" in caplog.text
        path.write_text('"id"\t"text"\n1\tone\n')
        assert "try `data.source=quoted_tsv`" in refusal("csv", path)
        path.write_text('id\ttext\n1\t"one\ttwo"\t\n')
        assert "try `data.source=quoted_tsv` if cells" in refusal("csv", path)

    def test_other_signatures_are_kept(self, tmp_path, monkeypatch):
        """What the cache knows of a TSV was read with quotes; all else is read as before."""
        monkeypatch.setattr(paths, "_SETTLED_SECONDS", -60)
        for name, version in (("a.csv", 1), ("a.tsv", 2), ("a.tsv.gz", 2)):
            path = tmp_path / name
            path.write_text("text\nx\n")
            table = open_table("csv", "data.path", str(path), "text", join_rows=False)
            options = ("table", version, "csv", "text", False)
            assert table.signature() == paths.signature_of([path], options) != ""


def write_bytes(kind, path, cells):
    """A table of texts given as bytes, which may not be UTF-8."""
    if kind == "parquet":
        offsets = pa.array(cells, pa.binary()).buffers()
        column = pa.Array.from_buffers(pa.string(), len(cells), offsets)
        pq.write_table(pa.table({"text": column}), path)
    elif kind == "json":
        path.write_bytes(b"".join(b'{"text": "%s", "n": 1}\n' % cell for cell in cells))
    else:
        path.write_bytes(b"text\n" + b"".join(cell + b"\n" for cell in cells))
    return path


class TestBadBytes:
    CELLS = [b"one", b"caf\xe9 \xef\xbf\xbd\xe2\x82 x", "\u20ac \U0001f411".encode()]

    @KINDS
    def test_strict_names_the_row_and_the_choice(self, tmp_path, kind):
        path = write_bytes(kind, tmp_path / f"a.{kind}", self.CELLS)
        for joined in (False, True):
            message = refusal(kind, path, join_rows=joined)
            where = "line 2: byte 0xe9" if kind == "json" else f"a.{kind}#1 (byte 0xe9 at offset 3"
            assert message.startswith("data.path: ") and where in message
            assert "`data.encoding_errors=replace` or `data.encoding_errors=skip`" in message
            assert (kind == "csv") == ("try iconv -f WINDOWS-1252 -t UTF-8 FILE" in message)

    @KINDS
    def test_replaced_and_counted(self, tmp_path, kind, caplog):
        path = write_bytes(kind, tmp_path / f"a.{kind}", self.CELLS)
        expected = [cell.decode(errors="replace") for cell in self.CELLS]
        for joined in (False, True):
            caplog.clear()
            texts = texts_of(kind, path, join_rows=joined, encoding_errors="replace")
            assert texts == (["\n".join(expected) + "\n"] if joined else expected)
            (record,) = caplog.records
            assert record.message == "2 invalid UTF-8 sequences replaced by U+FFFD"

    @KINDS
    def test_skipped_and_counted(self, tmp_path, kind, caplog):
        path = write_bytes(kind, tmp_path / f"a.{kind}", self.CELLS)
        documents = open_table(kind, "data.path", str(path), "text", False, encoding_errors="skip")
        reasons = []
        for document in documents:
            try:
                "".join(document.pieces)
            except SkipDocument as reason:
                reasons.append((document.id, str(reason)))
        assert reasons == [(f"a.{kind}#1", "rows that are not UTF-8")]
        caplog.clear()
        (text,) = texts_of(kind, path, join_rows=True, encoding_errors="skip")
        assert text == "one\n\u20ac \U0001f411\n"
        assert [record.message for record in caplog.records] == [
            "1 rows skipped that are not UTF-8"
        ]

    @KINDS
    def test_good_text_is_the_same_by_any_choice(self, tmp_path, kind, caplog):
        path = WRITERS[kind](tmp_path / f"a.{kind}", [*TEXTS, "\ufffd"])
        for errors in ("strict", "replace", "skip"):
            assert texts_of(kind, path, encoding_errors=errors) == [*TEXTS, "\ufffd"]
        assert not caplog.records

    def test_half_characters_are_left_to_the_corpus_store(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(rb'{"text": "a\ud83d"}' + b"\n" + b'{"text": "\xff\\ud83d"}\n')
        assert texts_of("json", path, encoding_errors="replace") == ["a\ud83d", "\udcff\ud83d"]


class TestColumns:
    def test_binary_columns_of_parquet_hold_text(self, tmp_path):
        """As Spark and Impala write it."""
        path = tmp_path / "a.parquet"
        for kind in (pa.binary(), pa.large_binary(), pa.large_string(), pa.string()):
            pq.write_table(
                pa.table({"text": pa.array(["\u20ac", None, ""], pa.string()).cast(kind)}), path
            )
            assert texts_of("parquet", path) == ["\u20ac", None, ""]
        categories = pa.array(["x", "y", "x"]).dictionary_encode()
        pq.write_table(pa.table({"text": categories}), path)
        assert texts_of("parquet", path) == ["x", "y", "x"]

    def test_two_of_one_name_are_refused(self, tmp_path):
        said = "data.text_column: got 'text'; expected a column name that occurs once, not 2 times"
        (tmp_path / "a.csv").write_text("text,id, text,text\n1,2,3,4\n")
        assert refusal("csv", tmp_path / "a.csv") == said
        assert texts_of("csv", tmp_path / "a.csv", "id") == ["2"]
        (tmp_path / "a.csv").write_text("text,text.1\n1,2\n")
        assert texts_of("csv", tmp_path / "a.csv", "text.1") == ["2"]
        columns = [pa.array(["a"]), pa.array(["b"])]
        pq.write_table(pa.Table.from_arrays(columns, ["text", "text"]), tmp_path / "a.parquet")
        assert refusal("parquet", tmp_path / "a.parquet") == said

    def test_blanks_around_a_name(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("\ufeffid , text\n1,one\n", encoding="utf-8")
        assert (texts_of("csv", path), texts_of("csv", path, "id")) == (["one"], ["1"])
        assert texts_of("csv", path, " text") == ["one"]
        assert "one of the columns ' text', 'id '" in refusal("csv", path, "body")

    def test_dotted_paths(self, tmp_path):
        rows = [{"meta": {"text": "one", "x": {"y": "1"}}, "a.b": "dot"}, {"meta": None}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        for kind, name in (("json", "a.jsonl"), ("parquet", "a.parquet")):
            assert texts_of(kind, tmp_path / name, "meta.text") == ["one", None]
            assert texts_of(kind, tmp_path / name, "meta.x.y") == ["1", None]
            assert texts_of(kind, tmp_path / name, "a.b") == ["dot", None]
            for wrong in ("meta.body", "meta.x.z", "x.y", "meta.text.x", "a."):
                assert f"got '{wrong}'; expected one of the columns" in refusal(
                    kind, tmp_path / name, wrong
                )

    LONG = "It is a truth universally acknowledged"

    @pytest.mark.parametrize(
        ("row", "hint"),
        [
            ({"id": 7, "title": "Pride", "review": LONG}, "`data.text_column=review`"),
            ({"id": 7, "The Review": LONG, "x": "y"}, "`data.text_column='The Review'`"),
            ({"id": 7, "meta": {"body": LONG, "n": 1}}, "`data.text_column=meta.body`"),
            ({"texts": "a", "body": LONG}, "`data.text_column=texts`"),
            ({"messages": [{"role": "user", "content": "hi"}]}, "jq -c '{text: ([.messages[]"),
            ({"data": [{"text": "a"}]}, "jq -c '.data[]' FILE > rows.jsonl"),
            ({"id": 7, "title": "Pride"}, tables._AS_TEXT),
        ],
    )
    def test_the_column_that_holds_text_is_suggested(self, tmp_path, row, hint):
        (tmp_path / "a.json").write_text(json.dumps(row))
        assert f"; try {hint}" in refusal("json", tmp_path / "a.json")
        if not any(isinstance(value, list) for value in row.values()):
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
            if hint != tables._AS_TEXT:
                assert f"; try {hint}" in refusal("parquet", tmp_path / "a.parquet")
        if all(isinstance(value, str | int) for value in row.values()):
            with (tmp_path / "a.csv").open("w") as file:
                csv.writer(file).writerows([row.keys(), row.values()])
            assert f"; try {hint}" in refusal("csv", tmp_path / "a.csv")

    def test_objects_and_lists_are_answered_with_what_is_supported(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": {"n": 1, "en": "two"}}\n')
        assert refusal("json", path).endswith("a text column; try `data.text_column=text.en`")
        path.write_text('{"text": [{"role": "user", "content": "x"}]}\n')
        assert "a text column; try jq -c '{text: ([.text[].content]" in refusal("json", path)


def test_csv_with_other_columns_of_any_kind(tmp_path):
    rows = [f"{'x' if i > 3000 else i},row {i}" for i in range(4000)]  # read in several parts
    (tmp_path / "a.csv").write_text("\n".join(["\ufefftext,other", *rows, "only", ""]))
    assert texts_of("csv", tmp_path / "a.csv", "text")[-2:] == ["x", "only"]
    assert texts_of("csv", tmp_path / "a.csv", "other")[2999:] == [
        *(f"row {i}" for i in range(2999, 4000)),
        "",
    ]
    (tmp_path / "a.csv").write_text("id,text\n")
    assert read("csv", tmp_path / "a.csv") == []


def test_json_as_one_document(tmp_path):
    path = tmp_path / "a.json"
    for rows in ([{"text": "one"}, {"text": "two", "m": 3}], [{"text": "\u00e9"}]):
        for indent in (None, 2):
            path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
            assert texts_of("json", path) == [row["text"] for row in rows]
    path.write_text(json.dumps({"text": "one"}, indent=2))
    assert texts_of("json", path) == ["one"]


def test_json_rows_that_differ(tmp_path):
    """What `datasets` would take for times, or encode because a column's type changes."""
    rows = [{"m": "x"}, {"text": "2020-01-01", "m": 1}, {"text": "[1]", "m": {"q": [2]}, "n": 3}]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\r\n".join(["\ufeff" + lines[0], *lines[1:]]), encoding="utf-8")
    assert texts_of("json", path) == [None, "2020-01-01", "[1]"]


def test_json_halves_of_characters_are_left_to_the_reader(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud83d\udc11b\ud83dc"}' + "\n" + r'{"text": "\ufffd"}')
    assert texts_of("json", path) == ["a\U0001f411b\ud83dc", "\ufffd"]


@pytest.mark.parametrize("compress, suffix", [(bytes, ""), (gzip.compress, ".gz")])
@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"line 3: Expecting ',' delimiter at column 13"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"line 2: byte 0xff is not UTF-8"),
        (b'[\n{"text": "a"},\n{"text": "b"\n]', r"line 4: Expecting ',' delimiter"),
        (b'[\n{"text": "a"},\n{"text": "\xff"}\n]', r"line 3: byte 0xff is not UTF-8"),
        (b'{"text": "a"}\n"b"\n', r"line 2: str, not an object"),
        (b'{"text": "a"}\n[{"text": "b"}]\n', r"line 2: list, not an object"),
        (b'{"text": "a"}\n' + b"[" * 200_000, r"line 2: "),
    ],
)
def test_a_broken_line_of_json_is_named(tmp_path, content, said, compress, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(content))
    message = refusal("json", path)
    assert re.search(rf"data\.path: got ['\"]{path} \({said}.*one object per line", message)
    hint = "correcting that line, or `data.source=files`"
    if "UTF-8" in said:
        choices = "`data.encoding_errors=replace` or `data.encoding_errors=skip`"
        hint = f"correcting that line, {choices}, or `data.source=files`"
    assert hint in message


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.parquet", b"no parquet" * 9, r"magic bytes.*expected a parquet file$"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", r"Expected 2 fields in line 3, saw 3.*source=files"),
        ("a.csv", b"id,text\n1,hello, all\n2,you, too\n", r"more cells than the header"),
        ("a.csv", b'id,text\n1,"a\n', r"EOF inside string"),
        ("a.csv", b"", r"No columns"),
        ("a.csv", "id,text\n1,a\n".encode("utf-16"), r"iconv -f UTF-16 -t UTF-8"),
        ("a.json.gz", b"plain", r"a\.json\.gz \(Not a gzipped file"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-30], r"a\.json\.gz \("),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(name.split(".")[1], path)
    assert re.search(rf"^data\.path: got ['\"]{path} \(", message) and re.search(said, message)


@KINDS
def test_a_column_that_is_not_there_or_holds_no_text(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"a.{kind}")
    said = "data.text_column: got 'body'; expected one of the columns id, text"
    hint = "" if kind == "parquet" else f"; try {tables._AS_TEXT}"
    assert refusal(kind, path, "body") == said + hint
    if kind != "csv":
        said = f"data.text_column: got 'id ({path.name}#0 holds int)'; expected a text column"
        assert refusal(kind, path, "id") == refusal(kind, path, "id", join_rows=True) == said


def test_a_column_that_is_meant_is_guessed(tmp_path):
    path = tmp_path / "a.csv"
    for head, hint in (
        ("id,body", "`data.text_column=body`, or "),
        ("text", "`data.text_column=text`, or "),
        ("id;bdy", "commas as separators, or tabs in a .tsv file, or "),
        ("once upon a time", ""),
        ("id,text", ""),
    ):
        path.write_text(f"{head}\n" + ",".join("x" for _ in head.split(",")) + "\n")
        assert refusal("csv", path, "bdy").endswith(f"; try {hint}{tables._AS_TEXT}")


def test_the_signature_names_the_files_and_the_options(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.jsonl")

    def signature(spec=tmp_path, column="text", join_rows=False):
        return open_table("json", "data.path", str(spec), column, join_rows=join_rows).signature()

    assert signature() == ""  # written just now
    monkeypatch.setattr(paths, "_SETTLED_SECONDS", 0)
    first = signature()
    assert first and first == signature() == signature(path)
    assert len({first, signature(column="id"), signature(join_rows=True)}) == 3
    os.utime(path, (1, 1))
    touched = signature()
    write_json(tmp_path / "b.jsonl")
    assert len({first, touched, signature()}) == 3
    assert signature(f"{path},http://127.0.0.1/x.jsonl") == ""


class TestWeb:
    @pytest.fixture
    def url(self, tmp_path):
        """Serves tmp_path; a name with "cut" ends early, one with "silent" is never answered."""
        stop = threading.Event()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                if "silent" in self.path:
                    stop.wait(30)
                elif "cut" in self.path:
                    self.send_response(200)
                    self.send_header("Content-Length", "99")
                    self.end_headers()
                    self.wfile.write(b'{"text": "a"}\n')
                else:
                    super().do_GET()

            def log_message(self, *arguments):
                pass

        handler = partial(Handler, directory=tmp_path)
        with Server(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            stop.set()
            server.shutdown()

    @KINDS
    def test_a_file_of_the_web_is_read_and_not_left_behind(self, tmp_path, url, kind, monkeypatch):
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(web.tempfile, "tempdir", str(tmp_path / "temporary"))
        path = WRITERS[kind](tmp_path / f"a.{kind}")
        local = WRITERS[kind](tmp_path / f"b.{kind}", ["local"])
        assert texts_of(kind, f"{url}/{path.name}?x=1, {local}") == [*TEXTS, "local"]
        assert texts_of(kind, f"{local},{url}/{path.name}") == ["local", *TEXTS]
        if kind != "parquet":
            (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(path.read_bytes()))
            assert texts_of(kind, f"{url}/a.{kind}.gz") == TEXTS
        assert not list((tmp_path / "temporary").iterdir())

    @pytest.mark.parametrize(
        "name, said",
        [
            ("none.jsonl", "HTTP 404: File not found"),
            ("cut.jsonl", "85 bytes before the end"),
            ("silent.jsonl", "timed out"),
        ],
    )
    def test_what_is_not_served_is_one_line_and_soon(self, url, name, said, monkeypatch):
        monkeypatch.setattr(web, "_NETWORK_SECONDS", 0.2)
        message = refusal("json", f"{url}/{name}")
        assert message.startswith(f"data.path: got '{url}/{name} (") and said in message
        assert message.endswith("the network, or downloading it and passing its path")

    def test_secrets_are_not_part_of_a_name(self, tmp_path, url):
        write_json(tmp_path / "a.jsonl", ["one"])
        shown = f"{url}/a.jsonl?token=\u2026"
        assert read("json", f"{url}/a.jsonl?token=s3cret") == [(f"{shown}#0", "one")]
        assert read("json", f"{url}/a.jsonl?token=s3cret", join_rows=True) == [(shown, "one\n")]

    def test_other_schemes(self, tmp_path):
        assert texts_of("csv", f"file://{write_csv(tmp_path / 'a.csv')}") == TEXTS
        assert re.search(r"got 'no://x \(.*no.*\)'; expected a file", refusal("csv", "no://x"))

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.csv", "http://nowhere.invalid/x.csv"])
    def test_no_network(self, url):
        assert re.search(r"got '.* \(.*(refused|[Nn]ame).*\)'; expected", refusal("csv", url))

    def test_a_broken_line_is_named(self, tmp_path, url):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
        assert f"{url}/a.jsonl (line 2: " in refusal("json", f"{url}/a.jsonl")


def test_a_program_that_stops_early_ends_at_once_and_silently(tmp_path, process_env):
    """Threads of pyarrow have kept such a program from ending (huggingface/datasets#8169)."""
    for kind in WRITERS:
        WRITERS[kind](tmp_path / f"a.{kind}", TEXTS * 200)
    program = f"""
import sys
import sheepop_jax.data.sources.hub
from sheepop_jax.data.sources.tables import open_table
slow = dict.fromkeys(("datasets", "huggingface_hub", "pandas", "pyarrow"))
print(slow.keys() & sys.modules)
left = []
for close in (True, False):
    for kind in ("json", "csv", "parquet"):
        path = {str(tmp_path)!r} + "/a." + kind
        documents = iter(open_table(kind, "data.path", path, "text", join_rows=False))
        print(next(documents).pieces)
        if close:
            documents.close()
        left.append(documents)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], env=process_env, capture_output=True, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.split() == [b"set()"] + [b"('one',)"] * 6


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_bomb_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(files, "_FREE_EXPANSION_BYTES", 2**18)
    path = WRITERS[kind](tmp_path / f"rows.{kind}", ["x" * 2**21])
    packed = tmp_path / f"rows.{kind}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="over 250 times its size"):
        read(kind, packed)
    assert len(read(kind, path)) == 1


def test_a_row_that_holds_no_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": {"en": "two"}}\n')
    with pytest.raises(InputError, match=r"text \(a\.jsonl#1 holds dict\)"):
        read("json", tmp_path / "a.jsonl")
