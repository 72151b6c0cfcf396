"""A tiny training run from each kind of source, and what bad data does to one: the whole way."""

import gzip
import http.server
import json
import os
import re
import shutil
import sqlite3
import threading

import numpy as np
import pytest

import train as program
from sheepop_jax import __main__ as tools
from sheepop_jax import pipeline
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.errors import InputError
from sheepop_jax.runtime import distributed
from sheepop_jax.runtime.devices import Runtime
from sheepop_jax.training.signals import StopSignal
from tests.data.sources.test_pdf import pdf
from tests.data.sources.test_sql import server  # noqa: F401  a fixture: a real PostgreSQL

pytestmark = pytest.mark.usefixtures("fast_compile")

MACHINE = Runtime("cpu", "cpu", 8, 0.0)
WORDS = "the sheep and its wool on a hill of grass beside the sea, in rain".split()
TEXTS = [f"{i}: " + " ".join(np.random.default_rng(i).choice(WORDS, 12 + i % 5)) for i in range(60)]


def as_files(root):
    for i, text in enumerate(TEXTS):
        (root / f"{i:02}.txt").write_text(text)
    return {"path": str(root)}


def as_compressed(root):
    for i, text in enumerate(TEXTS):
        (root / f"{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return {"path": str(root)}


def as_jsonl(root):
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {"path": str(root / "a.jsonl")}


def as_csv(root):
    import pandas

    pandas.DataFrame({"n": range(len(TEXTS)), "text": TEXTS}).to_csv(root / "a.csv", index=False)
    return {"path": str(root / "*.csv")}


def as_parquet(root):
    import pandas

    pandas.DataFrame({"body": TEXTS}).to_parquet(root / "a.parquet")
    return {"path": str(root / "a.parquet"), "text_column": "body"}


def as_hub(root):
    import pandas

    is_val = [f"held out {text}" for text in TEXTS[:20]]
    pandas.DataFrame({"text": TEXTS}).to_parquet(root / "train-00000.parquet")
    pandas.DataFrame({"text": is_val}).to_parquet(root / "validation-00000.parquet")
    return {"name": str(root)}


def as_lines(root):
    return {**as_hub(root), "join_rows": True}


def as_pdfs(root):
    for i, text in enumerate(TEXTS):
        (root / f"{i:02}.pdf").write_bytes(pdf([f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"]))
    return {"source": "pdf", "path": str(root)}


def as_sqlite(root):
    with sqlite3.connect(root / "a.db") as database:
        database.execute("CREATE TABLE pages (id INTEGER, body TEXT)")
        database.executemany("INSERT INTO pages VALUES (?, ?)", list(enumerate(TEXTS)))
    database.close()
    query = "SELECT body FROM pages ORDER BY id"
    return {"path": str(root / "a.db"), "query": query, "text_column": "body"}


def as_mixture(root):
    (root / "prose").mkdir()
    as_files(root / "prose")
    (root / "is_val.txt").write_text(" ".join(TEXTS[:9]))
    rows = {"weight": 1.0, "val_path": str(root / "is_val.txt")}
    (root / "more.txt").write_text("\n".join(text.replace("sheep", "goat") for text in TEXTS))
    return {
        "mixture": {
            "prose": {"weight": 3.0, "path": str(root / "prose")},
            "goats": {**rows, "path": str(root / "more.txt")},
        }
    }


KINDS = [as_files, as_compressed, as_jsonl, as_csv, as_parquet, as_hub, as_lines, as_pdfs]
KINDS += [as_sqlite, as_mixture]


@pytest.fixture
def config(make_config, tmp_path):
    """`config({"path": …}, …)`: a run of a few steps on it."""

    def make(source, **more):
        fields = {"vocab_size": 280, "cache_dir": str(tmp_path / "cache"), **source, **more}
        fixed = {"train.batch_size": 8, "train.num_steps": 3, "train.sample_tokens": 0}
        return make_config(fixed | {f"data.{name}": value for name, value in fields.items()})

    return make


SIDES = ("train", "validation")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_source_becomes_tokens(kind, config, tmp_path):
    (tmp_path / "source").mkdir()
    made = config(kind(tmp_path / "source")).data
    data = prepare(made)
    streams = [*data.train, data.validation]
    text = "".join(data.tokenizer.decode(stream.read(0, len(stream))) for stream in streams)
    assert [each for each in TEXTS if each not in text] == []
    sides = [sum(s["documents"][side] for s in data.manifest["sources"]) for side in SIDES]
    match kind.__name__:
        case "as_lines":
            assert sides == [1, 1]
        case "as_hub":
            assert sides == [60, 20]
        case "as_mixture":
            found = {s["name"]: (s["split"], s["weight"]) for s in data.manifest["sources"]}
            assert found == {"prose": ("document", 0.75), "goats": ("source", 0.25)}
        case _:
            assert sum(sides) == 60 and sides[1] > 0


def test_rows_of_postgresql_become_tokens(config, server):  # noqa: F811  the fixture, not again
    text = "'sheep ' || i || ' is on hill ' || i * i"
    query = f"SELECT {text} AS body FROM generate_series(1, 60) AS i ORDER BY i"
    data = prepare(config({"path": server, "query": query, "text_column": "body"}).data)
    [source] = data.manifest["sources"]
    assert source["documents_read"] == 60


def test_a_run_is_given_batches_of_a_mixture(config, tmp_path, monkeypatch):
    """What a source is makes no difference beyond its tokens: the loop itself does not run."""
    (tmp_path / "source").mkdir()
    jobs = []
    monkeypatch.setattr(pipeline, "fit", lambda job, stop: jobs.append(job) or {})
    pipeline.train(config(as_mixture(tmp_path / "source")), tmp_path / "run", MACHINE)
    run = open_run(tmp_path / "run")
    rows = [row for step in range(3) for row in np.vstack(jobs[0].batches.batch_at(step).inputs)]
    texts = [run.tokenizer.decode(row) for row in rows]
    assert 0 < sum("goat" in text for text in texts) < sum("sheep" in text for text in texts)
    assert [s["weight"] for s in run.prepared_data().manifest["sources"]] == [0.25, 0.75]


class TestSeveralProcesses:
    """Each played by this one: what the first one sends is what the other gets."""

    @pytest.fixture
    def shards(self, config, tmp_path, monkeypatch):
        """`shards(of)`: what process `of` of two trains on."""
        (tmp_path / "source").mkdir()
        made = config(as_files(tmp_path / "source"))
        sent = []
        monkeypatch.setattr(distributed, "_count", 2)

        def exchange(content):
            if distributed.is_main_process():
                sent.append(content)
            return sent[-1]

        def shards(of):
            monkeypatch.setattr(distributed, "_index", of)
            monkeypatch.setattr(pipeline, "wait_for_all", lambda what, timeout_seconds: None)
            monkeypatch.setattr(distributed, "_from_first", exchange)
            return pipeline._shards(made, tmp_path / "run", StopSignal(), None)

        return shards

    def test_the_others_open_what_the_first_one_prepared(self, shards, monkeypatch):
        first = shards(0)
        monkeypatch.setattr(pipeline, "prepare", None)
        other = shards(1)
        assert (other.directory, other.identity) == (first.directory, first.identity)

    def test_they_fail_as_the_first_one_does(self, shards, monkeypatch):
        def refuse(config, check, format):
            raise InputError("data.path", "a", "b")

        monkeypatch.setattr(pipeline, "prepare", refuse)
        for process in (0, 1):
            with pytest.raises(InputError) as error:
                shards(process)
            assert error.value.field == "data.path"

    def test_a_cache_that_is_not_shared_is_an_error(self, shards):
        shutil.rmtree(shards(0).directory)
        with pytest.raises(InputError) as error:
            shards(1)
        assert error.value.field == "data.cache_dir"
        assert error.value.expected == "a directory that all processes share"


def words(kind, root, tmp_path):
    """The same as `config`, as a user types it."""
    fields = {"cache_dir": str(tmp_path / "cache"), "tokenizer": "char", "seq_len": 16, **kind}
    return [f"--config.data.{name}={value}" for name, value in fields.items()]


def broken_jsonl(root):
    (root / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"\n')
    return {"path": root / "a.jsonl"}


def other_column(root):
    (root / "a.jsonl").write_text('{"title": "one", "body": "two"}\n')
    return {"path": root / "a.jsonl"}


def fifo(root):
    os.mkfifo(root / "pipe")
    return {"path": root / "pipe"}


def loop(root):
    (root / "loop").symlink_to("loop")
    return {"path": root / "loop"}


def file(name, content):
    def make(root):
        (root / name).write_bytes(content)
        return {"path": root / name}

    return make


def unseen(root):
    (root / "a.txt").write_text("ab" * 200 + "\u2603")
    (root / "tokenizer.json").write_text(train_char(["ab"]).to_json())
    return {"path": root / "a.txt", "tokenizer": root / "tokenizer.json"}


BAD = [
    (lambda root: {"path": root / "no.txt"}, r"data\.path: got '.*no\.txt'; expected an existing"),
    (lambda root: {"path": root}, r"data\.path: .*a directory with text files"),
    (
        file("a.txt", b""),
        r"data\.path: .*a\.txt'; expected a source with text .*empty or only white space",
    ),
    (file("a.txt", b" \n\t\n"), r"data\.path: .*only white space"),
    (file("a.txt", b"abcabcabc"), r"data\.seq_len: got 16; expected at most \d+: the training"),
    (file("a.txt", b"caf\xe9 au lait" * 9), r"data\.path: .*byte 0xe9 at offset 3 is not UTF-8"),
    (file("a.txt", b"\x7fELF\x02\x00\xff\x01" * 9), r"data\.path: got 'binary file .*offset 6"),
    (file("a.gz", b"\x1f\x8b\x08 nothing"), r"data\.path: .*a\.gz .*expected a readable file"),
    (file("a.parquet", b"PAR1 it is not"), r"data\.path: .*a\.parquet .*a parquet file"),
    (broken_jsonl, r"data\.path: .*a\.jsonl \(line 2: "),
    (other_column, r"data\.text_column: got 'text'; expected one of the columns body, title"),
    (fifo, r"data\.path: .*a pipe, socket or device"),
    (loop, r"data\.path: .*loop \(.*symbolic links"),
    (unseen, r"a\.txt: got .*U\+2603\) at position 400\"; .*data\.tokenizer=bpe"),
    (
        lambda root: {"path": "http://me:secret@127.0.0.1:9/a.txt?sig=secret"},
        r"data\.path: got 'http://…@127\.0\.0\.1:9/a\.txt\?sig=… \(.*refused.*downloading",
    ),
    (
        lambda root: {"path": "http://me:secret@127.0.0.1:9/a.jsonl"},
        r"data\.path: got 'http://…@127\.0\.0\.1:9/a\.jsonl \(.*refused.*downloading",
    ),
    (
        lambda root: {"path": "s3://key:secret@h/a.txt"},
        r"data\.path: got 's3://…@h/a\.txt'; .*http",
    ),
    (
        lambda root: {"path": "http://[me:secret@h/a.jsonl"},
        r"data\.path: got 'http://…@h/a\.jsonl \(.*Invalid IPv6 URL\)'",
    ),
    (
        lambda root: {"path": root / "a.txt", "text_column": "b"},
        r"data\.text_column: got 'b'; .*fil",
    ),
    (lambda root: {"name": "nobody/nothing-of-the-kind"}, r"data\.name: got 'nobody/nothing"),
    (lambda root: {"path": "http://127.0.0.1:9/a.jsonl"}, r"data\.path: .*refused.*network"),
    (lambda root: {"path": "postgresql://me:secret@h/d", "query": "q"}, r"data\.path: .*password"),
    (lambda root: {"path": root / "a.db", "query": "SELECT 1"}, r"data\.path: .*a\.db"),
    (lambda root: {"path": root, "val_split": "tial"}, r"data\.val_split: .* try 'tail'"),
]


# Of the bad ones: found before the text is read, in it, after it, and by the tokenizer.
BY_TRAIN = [BAD[0], BAD[8], BAD[4], BAD[13]]


@pytest.mark.parametrize(
    ("make", "said", "which"),
    [*((make, said, "data") for make, said in BAD), *((*bad, "train") for bad in BY_TRAIN)],
)
def test_bad_data_is_one_line_and_leaves_nothing(make, said, which, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the hub is not there, and says so at once
    (tmp_path / "source").mkdir()
    flags = ["--config", "configs/quickstart.py", *words(make(tmp_path / "source"), 0, tmp_path)]
    before = sorted((tmp_path / "source").iterdir())
    with pytest.raises(SystemExit) as left:
        if which == "train":
            program.main([*flags, "--workdir", str(tmp_path / "run")])
        else:
            tools.main(["data", *flags])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.splitlines()[-1] == line and out == ""
    assert "secret" not in err and "Traceback" not in err
    assert re.match(f"error: {said}", line), line
    assert sorted(tmp_path.iterdir()) == [tmp_path / "source"]
    assert sorted((tmp_path / "source").iterdir()) == before


def test_secrets_of_a_url_are_saved_nowhere_and_the_run_resumes(config, tmp_path, monkeypatch):
    """The text comes from a server; the loop itself does not run."""
    text = "\n".join(TEXTS).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(pipeline, "fit", lambda job, stop: {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://me:s3cret@127.0.0.1:{web.server_port}/a.txt?token=s3cret"
        for made in (config({"path": url}), config({"mixture": {"m": {"weight": 1, "path": url}}})):
            for _ in range(2):  # the second one resumes
                pipeline.train(made, tmp_path / "run", MACHINE)
            assert "\u2026@127" in str(open_run(tmp_path / "run").config.data)
            saved = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert not [path for path in saved if b"s3cret" in path.read_bytes()]
            shutil.rmtree(tmp_path / "run")
        web.shutdown()


def test_bad_bytes_are_replaced_or_skipped_by_choice(config, tmp_path, caplog):
    root = tmp_path / "source"
    root.mkdir()
    source = as_files(root)
    (root / "bad.txt").write_bytes(b"caf\xe9 au lait")
    data = prepare(config(source, encoding_errors="replace").data)
    assert "1 invalid UTF-8 sequences replaced" in caplog.text
    assert data.manifest["sources"][0]["documents_read"] == 61
    data = prepare(config(source, encoding_errors="skip").data)
    assert data.manifest["sources"][0]["skipped"] == {"not UTF-8": 1}
