"""Which reader reads a configured source, and what it holds out."""

import json
import os
import sqlite3

import pytest

from sheepop_jax.data.sources import corpus as module
from sheepop_jax.data.sources import paths
from sheepop_jax.data.sources.corpus import open_corpus
from sheepop_jax.errors import InputError


@pytest.fixture
def corpus_of(make_config):
    """`corpus_of(path, encoding_errors="skip")`: the corpus of these `data` fields."""

    def make(path="", **fields):
        fields = {f"data.{name}": value for name, value in fields.items()}
        return open_corpus(make_config({"data.path": str(path), **fields}).data)

    return make


@pytest.fixture
def read(corpus_of):
    def read(*args, **fields):
        corpus = corpus_of(*args, **fields)
        first = [(d.id, "".join(d.pieces), d.is_val) for d in corpus]
        assert first == [(d.id, "".join(d.pieces), d.is_val) for d in corpus], "order changed"
        return first

    return read


JSON, CSV = (f"{kind} files (data.source={kind} reads them)" for kind in ("json", "csv"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "d" / "b.md").write_text("two, longer")
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": "three"}) + "\n")
    (tmp_path / "d" / "c.tsv").write_text("id\tbody\n1\tfour\n")
    with sqlite3.connect(tmp_path / "e.db") as connection:
        connection.execute("CREATE TABLE pages (body)")
        connection.execute("INSERT INTO pages VALUES ('five')")
    connection.close()
    return tmp_path


class TestReaders:
    def test_files(self, root, read, corpus_of):
        assert read(root) == [("a.txt", "one", False), ("d/b.md", "two, longer", False)]
        assert read(root / "c.jsonl", source="files")[0][1] == '{"body": "three"}\n'
        corpus = corpus_of(root)
        assert (corpus.field, corpus.value, corpus.num_bytes) == ("data.path", str(root), 14)
        assert corpus.skipped == {JSON: 1, CSV: 1, ".db files": 1}

    def test_tables(self, root, read):
        assert read(root / "c.jsonl", text_column="body")[0][1:] == ("three", False)
        assert read(root / "d" / "c.tsv", text_column="body")[0][1:] == ("four", False)
        assert [row[1] for row in read(root, source="json", text_column="body")] == ["three"]

    def test_rows_that_are_read_as_text_are_said(self, root, read, caplog):
        said = "1 files look like {0} and are read as plain text; --config.data.source={0}"
        read(root / "d")
        assert "look like" not in caplog.text  # skipped, and counted there
        read(f"{root}/c.jsonl,{root}/d/c.tsv")
        assert said.format("json") in caplog.text and said.format("csv") in caplog.text
        caplog.clear()
        read(f"{root}/c.*l")
        assert said.format("json") in caplog.text
        caplog.clear()
        read(root / "c.jsonl", source="files")
        (root / "d" / "package.json").write_text("{}")  # of a source tree: text
        read(root / "d")
        assert "look like" not in caplog.text

    def test_a_name_may_hold_a_comma(self, root, read):
        (root / "my,c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        assert [row[1] for row in read(root / "my,c.jsonl")] == ["one", "two"]

    def test_rows_are_joined_by_choice(self, root, read):
        (root / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        assert [row[1] for row in read(root / "c.jsonl")] == ["one", "two"]
        assert len(read(root / "c.jsonl", join_rows=True)) == 1

    def test_sql(self, root, read):
        query = "SELECT body FROM pages"
        assert [r[1] for r in read(root / "e.db", query=query, text_column="body")] == ["five"]

    def test_the_standard_library(self, corpus_of):
        assert corpus_of().value == corpus_of("x", source="stdlib").value == "stdlib"

    @pytest.mark.parametrize(
        "fields, arguments, options",
        [
            ({"name": "n"}, ("n", "", "text"), {"join_rows": False, "encoding_errors": "strict"}),
            (
                {
                    "name": "n",
                    "subset": "s",
                    "text_column": "c",
                    "join_rows": True,
                    "encoding_errors": "skip",
                },
                ("n", "s", "c"),
                {"join_rows": True, "encoding_errors": "skip"},
            ),
        ],
    )
    def test_hub(self, corpus_of, monkeypatch, fields, arguments, options):
        monkeypatch.setattr(module, "open_hub", lambda *a, **o: (a, o))
        assert corpus_of(**fields) == (arguments, options)

    def test_pdf(self, corpus_of, monkeypatch):
        monkeypatch.setattr(module, "open_pdfs", lambda *arguments: arguments)
        field, spec, walk = corpus_of("x", source="pdf", max_file_bytes=3, gitignore=False)
        assert (field, spec) == ("data.path", "x")
        assert (walk.suffixes, walk.max_file_bytes, walk.gitignore) == ({".pdf"}, 3, False)

    def test_named_pages_are_refused_unless_their_tags_are_wanted(self, root, read, corpus_of):
        page = root / "d" / "page.html"
        page.write_text("<p>six</p>")
        assert "<p>six</p>" in [row[1] for row in read(root)]  # of a source tree: text
        assert read(page, source="files")[0][1] == "<p>six</p>"
        for named in (page, f"{root}/d/*.html", f"{root}/a.txt,{page}", "http://h/p.HTM?x=1"):
            with pytest.raises(InputError) as caught:
                corpus_of(named)
            assert caught.value.field == "data.path"
            assert caught.value.expected == "text without tags"
            assert "pandoc" in caught.value.hint and "`data.source=files`" in caught.value.hint

    def test_other_databases_come_with_what_exports_them(self, corpus_of):
        for source in ("auto", "sql"):
            with pytest.raises(InputError) as caught:
                corpus_of("mysql://me:s3cret@h/d", source=source, query="SELECT 1")
            assert "mysql --batch" in caught.value.hint and "s3cret" not in str(caught.value)
        with pytest.raises(InputError, match=r"notes\.db3'; expected an existing file"):
            corpus_of("notes.db3", query="SELECT 1")


class TestFieldsReachTheReader:
    @pytest.mark.parametrize("source, kept", [("files", 2), ("json", 1), ("csv", 1)])
    def test_gitignore_and_max_file_bytes(self, root, corpus_of, source, kept):
        def count(**fields):
            return len(list(corpus_of(root, source=source, text_column="body", **fields)))

        assert count() == kept
        (root / ".gitignore").write_text("*\n")
        assert count(gitignore=False) == kept
        with pytest.raises(InputError, match=r"data\.gitignore=False"):
            count()
        with pytest.raises(InputError, match=r"larger than data\.max_file_bytes"):
            count(gitignore=False, max_file_bytes=2)

    def test_encoding_errors(self, root, read, caplog):
        (root / "a.txt").write_bytes(b"a\xff")
        with pytest.raises(InputError, match="not UTF-8"):
            read(root / "a.txt")
        assert read(root / "a.txt", encoding_errors="replace") == [("a.txt", "a\ufffd", False)]
        assert len(caplog.records) == 2  # read twice


class TestValPath:
    def test_it_is_held_out_and_comes_first(self, root, read, corpus_of):
        found = read(root / "a.txt", val_path=str(root / "d"))
        assert found == [("b.md", "two, longer", True), ("a.txt", "one", False)]
        corpus = corpus_of(root / "a.txt", val_path=str(root))
        assert (corpus.field, corpus.value) == ("data.path", str(root / "a.txt"))
        assert corpus.skipped == {JSON: 1, CSV: 1, ".db files": 1}
        twice = corpus_of(root, val_path=f"{root}/d").skipped
        assert twice == {JSON: 1, CSV: 2, ".db files": 1}
        assert corpus.num_bytes == 17

    def test_the_size_is_unknown_if_one_is(self, root, corpus_of, monkeypatch):
        sizes = {"a.txt": 0, "b.md": 11}
        monkeypatch.setattr("sheepop_jax.data.sources.files.size_of", lambda p: sizes[p.name])
        one, other = str(root / "a.txt"), str(root / "d" / "b.md")
        assert corpus_of(one, val_path=other).num_bytes == 0
        assert corpus_of(other, val_path=one).num_bytes == 0

    def test_tables_too(self, root, read):
        (root / "v.jsonl").write_text(json.dumps({"body": "six"}) + "\n")
        found = read(root / "c.jsonl", val_path=str(root / "v.jsonl"), text_column="body")
        assert [row[1:] for row in found] == [("six", True), ("three", False)]

    def test_the_same_path_is_refused_by_its_name(self, root, corpus_of):
        for same in (f"{root}/a.txt", f"{root}/d/../a.txt "):
            with pytest.raises(InputError, match=r"^data\.val_path: .*files other than"):
                corpus_of(root / "a.txt", val_path=same)

    def test_errors_name_it(self, root, corpus_of, read):
        with pytest.raises(InputError, match=r"^data\.val_path: .*an existing.*data\.val_path=PA"):
            corpus_of(root, val_path="missing")
        (root / "bad").write_bytes(b"\xff")
        with pytest.raises(InputError, match=r"^data\.val_path: .*not UTF-8"):
            read(root, val_path=str(root / "bad"))

    def test_the_signature_is_of_both(self, root, corpus_of, monkeypatch):
        corpus = corpus_of(root / "a.txt", val_path=str(root / "d"))
        monkeypatch.setattr(paths, "_SETTLED_SECONDS", -60.0)
        first = corpus.signature()
        assert first == corpus.signature() != corpus_of(root / "a.txt").signature()
        for name in ("a.txt", "d/b.md"):
            os.utime(root / name, (1, 1))
            assert corpus.signature() != first
            first = corpus.signature()
        (root / "a.txt").unlink()
        assert corpus.signature() == ""
        (root / "a.txt").write_text("one")
        (root / "d" / "b.md").unlink()
        assert corpus.signature() == ""


def test_a_missing_path_is_named(corpus_of):
    with pytest.raises(InputError, match=r"^data\.path: got 'missing'.*`data\.path=PATH`"):
        corpus_of("missing")
