"""Weights & Biases: what is sent, refused before training, and survived. A stub stands for it."""

import json
import logging
import struct
import sys

import pytest

from sheepop_jax.errors import InputError
from sheepop_jax.training import trackers
from sheepop_jax.training.metrics import MetricsLog, read_metrics
from sheepop_jax.training.trackers import Wandb, check_trackers

STUB = """
import json, os
OUT = os.path.join(os.path.dirname(__file__), "calls")
class Error(Exception): pass
class Settings:
    mode = os.environ.get("WANDB_MODE", "online")
    def __init__(self, **given): pass
class Setup:
    settings = Settings()
def setup(): return Setup
def login(verify):
    if "STUB_KEY" not in os.environ: raise Error("no key")
    return True
def Html(text): return text
def call(*what):
    with open(OUT, "a") as file: file.write(json.dumps(what) + "\\n")
class Run:
    def define_metric(self, name, step_metric): pass
    def log(self, values): call("log", values)
    def finish(self): call("finish")
def init(settings, **given):
    if "STUB_FAILS" in os.environ: raise Error("unreachable")
    call("init", given)
    return Run()
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """`calls()`: what the stub was asked to do, in order."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "wandb.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(site)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return lambda: [json.loads(line) for line in (site / "calls").read_text().splitlines()]


def test_a_missing_package_or_login_is_an_error(calls, tmp_path, monkeypatch):
    with pytest.raises(InputError) as error:
        check_trackers(("tensorboard", "wandb"))
    assert (error.value.field, error.value.got) == ("train.trackers", "wandb")
    assert "wandb login" in error.value.hint
    monkeypatch.setenv("STUB_KEY", "1")
    check_trackers(("wandb",))
    monkeypatch.delenv("STUB_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(("wandb",))
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    (tmp_path / "wandb").mkdir()  # of an earlier run; no package
    for path in ([str(tmp_path)], []):
        with monkeypatch.context() as patched, pytest.raises(InputError) as error:
            patched.setattr(sys, "path", path)
            check_trackers(("wandb",))
        assert "pip install" in error.value.hint
    check_trackers(("tensorboard",))


def test_lines_and_samples_are_sent_and_a_resumed_run_is_the_same_run(
    calls, tmp_path, make_config, caplog
):
    run = tmp_path / "run"
    run.mkdir()
    config = make_config({"train.trackers": "wandb"})
    for first in (0, 3):
        log = MetricsLog(run, first, config=config)
        log.write(first + 1, {"loss": 2.0, "grad_norm": float("nan")})
        log.write(first + 1, {"val_loss": 2.5})
        log.write_sample(first + 1, "a <b>")
        log.close()
    assert not caplog.text and not (run / "tensorboard").exists()
    found = calls()
    assert [call[0] for call in found] == ["init", "log", "log", "log", "finish"] * 2
    about, again = found[0][1], found[5][1]
    assert about["id"] == again["id"] and about["resume"] == "allow" and about["name"] == "run"
    assert about["config"]["model"]["d_model"] == 60
    assert [call[1] for call in found[1:4]] == [
        {"step": 1, "train/loss": 2.0},
        {"step": 1, "val/loss": 2.5},
        {"step": 1, "sample": "<pre>a &lt;b&gt;</pre>"},
    ]


@pytest.mark.slow
def test_the_real_package_keeps_a_run_and_its_resumption_offline(
    tmp_path, make_config, monkeypatch, caplog
):
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 600)
    check_trackers(("wandb",))
    run = tmp_path / "run"
    run.mkdir()
    config = make_config({"train.trackers": "wandb"})
    for first in (0, 3):
        log = MetricsLog(run, first, config=config)
        log.write(first + 1, {"loss": 2.0, "grad_norm": float("nan")})
        log.write(first + 1, {"val_loss": 2.5})
        log.write_sample(first + 1, "a <b>")
        log.close()
        assert log._wandb._process.returncode == 0
    assert not caplog.text and (run / "wandb" / "process.log").read_text() == ""
    for step, directory in zip((1, 4), sorted(run.glob("wandb/offline-run-*")), strict=True):
        [path] = directory.glob("*.wandb")
        assert path.name == f"run-{(run / 'wandb' / 'run_id').read_text()}.wandb"
        kept = list(records(path.read_bytes()))
        [about] = [record.run for record in kept if record.HasField("run")]
        config_kept = {item.key: json.loads(item.value_json) for item in about.config.update}
        assert about.display_name == "run" and config_kept["model"]["d_model"] == 60
        lines = [
            {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in kept
            if record.HasField("history")
        ]
        assert [line["step"] for line in lines] == [step] * 3
        assert lines[0]["train/loss"] == 2.0 and "train/grad_norm" not in lines[0]
        assert lines[1]["val/loss"] == 2.5
        [page] = directory.glob("files/media/html/*.html")
        assert "<pre>a &lt;b&gt;</pre>" in page.read_text()
        assert any(record.metric.step_metric == "step" for record in kept)


def records(content):
    """The records of a .wandb file: protobuf messages in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = 7, b""  # after the header of the file
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # the rest of a block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


def test_a_failure_turns_it_off_with_one_warning(calls, tmp_path, make_config, monkeypatch, caplog):
    monkeypatch.setenv("STUB_FAILS", "1")
    log = MetricsLog(tmp_path, 0, config=make_config({"train.trackers": "wandb"}))
    log._wandb._process.wait(60)
    for step in range(1, 20):
        log.write(step, {"loss": 2.0})
    log.close()
    assert caplog.text.count("Weights & Biases turned off") == 1
    assert "unreachable" in (tmp_path / "wandb" / "process.log").read_text()
    assert len(read_metrics(tmp_path)) == 19
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb").write_text("in the way")
    Wandb(blocked, {}).close()
    assert caplog.text.count("Weights & Biases turned off") == 2


def test_a_process_that_hangs_is_not_waited_for(tmp_path, monkeypatch, caplog):
    """Neither with its input full, nor at the end."""
    caplog.set_level(logging.INFO)
    hangs = ["sleep", "60"]
    monkeypatch.setattr(trackers, "_PROGRAM", hangs)
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "_MAX_BEHIND", 1000)
    for lines, said in ((1, "still sending metrics"), (3, "cannot keep up")):
        tracker = Wandb(tmp_path, {})
        process = tracker._process
        for _ in range(lines):
            tracker.log({"text": "x" * 50_000})
        tracker.close()
        assert caplog.text.count(said) == 1
        process.kill()
        process.wait()
