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

from sheepop_jax.data.sources import files, paths, tables
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


def read(kind, spec, column="text", join_rows=False, **options):
    """The documents as (id, text); None where a row has no text."""
    found = []
    table = open_table(
        kind, "data.path", str(spec), column, join_rows, functools.partial(Walk, **options)
    )
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
    suffix = {"json": "ndjson", "csv": "tsv", "parquet": "parquet"}[kind]
    WRITERS[kind](tmp_path / f"b.{suffix}", ["b"])
    (tmp_path / "deep").mkdir()
    WRITERS[kind](tmp_path / "deep" / f"a [1]*.{suffix}", ["a"])  # no pattern, but a name
    WRITERS[kind](tmp_path / "other.dat", ["other"])
    assert read(kind, tmp_path) == [(f"b.{suffix}#0", "b"), (f"deep/a [1]*.{suffix}#0", "a")]
    assert texts_of(kind, f"{tmp_path}/**/*.{suffix}") == ["b", "a"]
    if kind != "csv":  # whose delimiter is told by the suffix
        assert texts_of(kind, f"{tmp_path}/other.dat, {tmp_path}/deep") == ["other", "a"]
    (tmp_path / "a, b").mkdir()
    assert texts_of(kind, WRITERS[kind](tmp_path / "a, b" / f"c.{suffix}")) == TEXTS
    table = open_table(kind, "data.path", str(tmp_path), "text", join_rows=False)
    assert table.skipped == {".dat files": 1}
    assert "larger than" in refusal(kind, tmp_path, max_file_bytes=1)
    assert "existing file" in refusal(kind, tmp_path / "none")


def test_comma_and_tab_separated_files_mix(tmp_path):
    write_csv(tmp_path / "a.csv", ["one, two\tthree"])
    write_csv(tmp_path / "b.tsv", ["four, five\tsix"])
    assert texts_of("csv", tmp_path) == ["one, two\tthree", "four, five\tsix"]


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
    assert "correcting that line, or `data.source=files`" in message


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.parquet", b"no parquet" * 9, r"magic bytes.*expected a parquet file$"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", r"Expected 2 fields in line 3, saw 3.*source=files"),
        ("a.csv", b"id,text\n1,hello, all\n2,you, too\n", r"more cells than the header"),
        ("a.csv", b"id,text\n1,\xff\n", r"0xff"),
        ("a.csv", b'id,text\n1,"a\n', r"EOF inside string"),
        ("a.csv", b"", r"No columns"),
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
        monkeypatch.setattr(tables.tempfile, "tempdir", str(tmp_path / "temporary"))
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
        monkeypatch.setattr(tables, "_NETWORK_SECONDS", 0.2)
        message = refusal("json", f"{url}/{name}")
        assert message.startswith(f"data.path: got '{url}/{name} (") and said in message
        assert message.endswith("the network, or downloading it and passing its path")

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
