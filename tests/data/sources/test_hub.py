"""Datasets of the hub and copies of them: the documents they give, and what is refused."""

import http.server
import json
import logging
import os
import re
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheepop_jax.data.sources import hub as module
from sheepop_jax.data.sources import paths
from sheepop_jax.data.sources.documents import SkipDocument
from sheepop_jax.data.sources.hub import open_hub
from sheepop_jax.errors import InputError


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that closing it waits for them


def read(name, subset="", column="text", join_rows=False, errors="strict"):
    """The documents as (id, text, is_val); text is None where a row has none."""
    found = []
    corpus = open_hub(name, subset, column, join_rows=join_rows, encoding_errors=errors)
    for document in corpus:
        try:
            text = "".join(document.pieces)
        except SkipDocument:
            text = None
        found.append((document.id, text, document.is_val))
    return found


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        import datasets  # here, since it takes seconds

        def serve(answer, commit="c0ffee"):
            def load_dataset(name, subset, **options):
                assert (name, options) == ("some/set", {"streaming": True})
                if isinstance(answer, Exception):
                    raise answer
                splits = answer if isinstance(answer, dict) else {"train": answer}
                return {
                    split: datasets.IterableDataset.from_generator(
                        lambda rows=rows: ({**row, "subset": subset} for row in rows)
                    )
                    for split, rows in splits.items()
                }

            def ask(name, seconds):
                assert name == "some/set"
                if isinstance(commit, Exception):
                    raise commit
                return commit

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
            monkeypatch.setattr(module, "_commit", ask)

        return serve

    def test_rows_become_documents(self, hub, caplog):
        caplog.set_level(logging.INFO)
        hub([{"body": "one"}, {"body": ""}, {"body": None}, {"body": "two\r\n"}])
        texts = ["one", "", None, "two\r\n"]
        expected = [(f"some/set#{i}", text, False) for i, text in enumerate(texts)]
        assert read("some/set", column="body") == expected
        assert caplog.text.count("data: opening some/set on the Hugging Face Hub") == 1
        assert read("some/set", "v2", "subset")[0][1] == "v2"

    @pytest.mark.parametrize("split", ["validation", "valid", "val", "dev"])
    def test_a_validation_split_is_held_out_and_first(self, hub, split):
        hub({"train": [{"text": "a"}], "test": [{"text": "t"}], split: [{"text": "v"}, {}]})
        is_val = [(f"some/set:{split}#0", "v", True), (f"some/set:{split}#1", None, True)]
        assert read("some/set") == [*is_val, ("some/set#0", "a", False)]
        joined = [(f"some/set:{split}", "v\n", True), ("some/set", "a\n", False)]
        assert read("some/set", join_rows=True) == joined

    @pytest.mark.parametrize(
        "answer, said",
        [
            ([{"body": "x", "id": 3}], r"data\.text_column: got 'text'.*columns body, id, subset"),
            ([{"text": 3}], r"data\.text_column: .*holds int"),
            ({"test": [], "dev": []}, r"data\.name: .*splits: test, dev\).*a train split"),
            (ConnectionError("no route"), r"data\.name: got 'some/set'.*no route.*try.*network"),
            (ValueError("BuilderConfig 'x' not found.\nAvailable: ['a']"), r"data\.subset.*'a'"),
            (ValueError("Config name is missing.\nPlease pick ['a']"), r"data\.subset.*'a'"),
            (
                RuntimeError("Dataset scripts are no longer supported, but found set.py"),
                r"data\.name: got 'some/set'.*not run; try .*refs/convert/parquet --local-dir DIR",
            ),
        ],
    )
    @pytest.mark.parametrize("join_rows", [False, True])
    def test_what_is_refused(self, hub, answer, said, join_rows):
        hub(answer)
        with pytest.raises(InputError, match=said) as caught:
            read("some/set", join_rows=join_rows)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("join_rows", [False, True])
    def test_a_connection_that_breaks_later(self, hub, join_rows, monkeypatch):
        def broken(dataset, column):
            yield "one"
            raise OSError("reset by peer")

        monkeypatch.setattr(module, "values_of", broken)
        hub([{"text": "x"}])
        with pytest.raises(InputError, match=r"data\.name: .*\(reset by peer\)"):
            read("some/set", join_rows=join_rows)

    def test_the_signature_names_the_commit_and_the_options(self, hub):
        def signature(subset="", column="text", join_rows=False):
            return open_hub("some/set", subset, column, join_rows=join_rows).signature()

        hub([])
        first = signature()
        assert first and first == signature()
        others = {signature("v2"), signature(column="body"), signature(join_rows=True)}
        hub([], commit="decaf")
        assert len({first, signature(), *others}) == 5
        hub([], commit=OSError("no network"))
        assert signature() == ""

    def test_a_silent_name_server(self, hub, monkeypatch):
        hub([])
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.1")
        answers = threading.Event()
        monkeypatch.setattr(module, "_commit", lambda *_: str(answers.wait(60)))
        before = threading.enumerate()
        with pytest.raises(InputError, match=r"no answer in 0\.1 s; HF_HUB_ETAG_TIMEOUT=30"):
            read("some/set")
        (left,) = set(threading.enumerate()).difference(before)  # still waits
        assert left.daemon  # does not keep the program from ending
        answers.set()
        left.join()

    def test_other_columns_are_not_decoded(self, hub, monkeypatch):
        import datasets  # here, since it takes seconds

        features = {"text": datasets.Value("string"), "picture": datasets.Image()}
        rows = datasets.IterableDataset.from_generator(
            lambda: iter([{"text": "one", "picture": {"bytes": b"no picture", "path": None}}]),
            features=datasets.Features(features),
        )
        hub([])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows})
        assert read("some/set") == [("some/set#0", "one", False)]


class TestCopy:
    @pytest.fixture
    def copy(self, tmp_path):
        """Writes {file: texts} below a directory named copy."""

        def write(files):
            (tmp_path / "copy").mkdir(exist_ok=True)
            for name, texts in files.items():
                path = tmp_path / "copy" / name
                rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
                if name.endswith(".parquet"):
                    pq.write_table(pa.Table.from_pylist(rows), path)
                else:
                    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return str(tmp_path / "copy")

        return write

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_with_and_without_a_validation_split(self, copy, suffix):
        name = copy({f"train-00000.{suffix}": ["one", None], f"train-00001.{suffix}": ["two\n"]})
        train = [(f"{name}#0", "one", False), (f"{name}#1", None, False)]
        train.append((f"{name}#2", "two\n", False))
        assert read(name) == train
        copy({f"validation-00000.{suffix}": ["v"], f"test-00000.{suffix}": ["t"]})
        assert read(name) == [(f"{name}:validation#0", "v", True), *train]
        joined = [(f"{name}:validation", "v\n", True), (name, "one\ntwo\n", False)]
        assert read(name, join_rows=True) == joined

    def test_bytes_that_are_not_utf_8_and_dotted_paths(self, tmp_path, caplog):
        name = str(tmp_path / "copy")
        os.mkdir(name)
        cells = [b"one", b"caf\xe9", "\u20ac".encode()]
        text = pa.Array.from_buffers(pa.string(), 3, pa.array(cells, pa.binary()).buffers())
        nested = pa.array([{"body": "x"}, None, {"body": "y"}])
        columns = {"text": text, "raw": pa.array(cells), "meta": nested}
        pq.write_table(pa.table(columns), f"{name}/train-0.parquet")
        for column in ("text", "raw"):
            where = rf"data\.name: got '{name}#1 \(byte 0xe9 at offset 3"
            with pytest.raises(InputError, match=where):
                read(name, column=column)
            texts = [text for _, text, _ in read(name, column=column, errors="replace")]
            assert texts == ["one", "caf\ufffd", "\u20ac"]
            assert "1 invalid UTF-8 sequences replaced by U+FFFD" in caplog.text
            texts = [text for _, text, _ in read(name, column=column, errors="skip")]
            assert texts == ["one", None, "\u20ac"]
        assert [text for _, text, _ in read(name, column="meta.body")] == ["x", None, "y"]
        with pytest.raises(InputError, match=r"one of the columns meta, raw, text"):
            read(name, column="meta.text")

    def test_a_relative_name(self, copy, tmp_path, monkeypatch):
        copy({"train-0.jsonl": ["one"]})
        monkeypatch.chdir(tmp_path)
        assert read("copy") == [("copy#0", "one", False)]

    def test_what_is_refused(self, copy, tmp_path):
        name = copy({"test-0.jsonl": ["one"]})
        with pytest.raises(InputError, match=r"data\.name: .*splits: test\).*a train split"):
            read(name)
        name = copy({"train-0.jsonl": ["one"]})
        with pytest.raises(InputError, match=r"data\.text_column: .*one of the columns id, text$"):
            read(name, column="body")
        with pytest.raises(InputError, match=r"data\.text_column: .*holds int"):
            read(name, column="id")
        with pytest.raises(InputError, match=r"data\.subset: got 'none'.*'default'"):
            read(name, "none")
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"data\.name: got '.*empty'.*contain any data files"):
            read(str(tmp_path / "empty"))
        (tmp_path / "empty" / "empty.py").write_text("raise SystemExit('it was run')")
        with pytest.raises(InputError, match=r"data\.name: got '.*empty'.*are not run"):
            read(str(tmp_path / "empty"))

    def test_the_signature_names_the_files_and_the_options(self, copy, monkeypatch):
        name = copy({"train-0.jsonl": ["one"]})

        def signature(subset="", column="text", join_rows=False):
            return open_hub(name, subset, column, join_rows=join_rows).signature()

        assert signature() == ""  # written just now
        monkeypatch.setattr(paths, "_SETTLED_SECONDS", 0)
        first = signature()
        assert first and first == signature()
        others = {signature("v2"), signature(column="id"), signature(join_rows=True)}
        copy({"train-1.jsonl": ["two"]})
        assert len({first, signature(), *others}) == 5

    def test_a_program_that_stops_reading_early_ends_silently(self, copy, tmp_path, process_env):
        """`datasets` leaves threads behind that have aborted programs at exit (datasets#8169)."""
        names = []
        for suffix in ("jsonl", "parquet"):
            texts = [f"sheep {i} on hill {i % 7}" for i in range(9999)]
            names.append(str(tmp_path / suffix))
            os.rename(copy({f"train-0.{suffix}": texts}), names[-1])
        command = [sys.executable, "-c", EARLY, *names]
        ran = subprocess.run(command, env=process_env, capture_output=True, timeout=120, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.splitlines() == ["sheep 0 on hill 0"] * 2

    def test_a_file_that_is_broken_is_told_by_the_error_alone(self, copy, tmp_path, capfd):
        name = copy({"train-0.jsonl": ["one"]})
        (tmp_path / "copy" / "train-0.jsonl").write_text('{"text": "a"}\n{"text"\n')
        with pytest.raises(InputError) as error:
            read(name)
        assert (error.value.field, error.value.got) == ("data.name", name)
        assert "JSON parse error" in error.value.expected
        assert capfd.readouterr() == ("", "")


EARLY = """
import sys
from sheepop_jax.data.sources.hub import open_hub
for name in sys.argv[1:]:
    documents = iter(open_hub(name, "", "text", join_rows=False))
    print("".join(next(documents).pieces))
    documents.close()
"""
PROGRAM = """
import sys
from sheepop_jax.data.sources.hub import open_hub
from sheepop_jax.errors import InputError
for name in sys.argv[1:]:
    corpus = open_hub(name, "", "text", join_rows=False)
    try:
        next(iter(corpus))
    except InputError as error:
        print(error)
"""


class TestNetwork:
    def ask(self, process_env, environment, *names):
        """What reading each says."""
        environment = process_env | {"HF_HUB_DISABLE_TELEMETRY": "1"} | environment
        command = [sys.executable, "-c", PROGRAM, *names]
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        assert ran.stderr == ""
        lines = ran.stdout.splitlines()
        assert len(lines) == len(names)
        return lines

    def test_no_network_is_one_line_that_says_how_to_go_on(self, process_env):
        for environment, reason in (
            ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "refused"),
            ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
        ):
            (message,) = self.ask(process_env, environment, "some/set")
            assert re.match(r"data\.name: got 'some/set \(Hub request failed: .*\)'", message)
            assert reason in message
            download = "'hf download some/set --repo-type dataset --local-dir DIR'"
            copy = f"`data.path`, or `data.name=DIR` with a copy made by {download}"
            assert message.endswith(copy)

    def test_what_a_hub_may_answer(self, process_env):
        stop, asked = threading.Event(), []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path.split("?")[0].rsplit("/")[-1])
                if "silent" in self.path:
                    stop.wait(30)
                    return
                missing = "missing" in self.path
                self.send_response(404 if missing else 500)
                if missing:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("X-HF-Warning", "topic; what the library would log")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        with Server(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
            names = ("some/missing", "some/broken", "some/silent", "no/such/name", "../x")
            said = self.ask(process_env, environment, *names)
            stop.set()
            server.shutdown()
        assert asked == ["missing", "broken", "silent"]  # once: the library alone tries for 25 s
        assert re.match(
            r"data\.name: got 'some/missing'; expected an existing Hub dataset;", said[0]
        )
        assert re.match(r"data\.name: got .some/broken \(.*500", said[1])
        assert re.match(
            r"data\.name: got .some/silent \(.*(HF_HUB_ETAG_TIMEOUT|timed out)", said[2]
        )
        for message in said[3:]:
            assert "OWNER/NAME of a Hub dataset, or a directory" in message
