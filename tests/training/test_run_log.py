"""The log survives its reader, a closed terminal and a full disk; train.log has all of it."""

import io
import logging
import os
import pty
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tqdm import tqdm

from sheepop_jax.runtime import streams
from sheepop_jax.training.run_log import NAME, RunLog, only_in_file


def reader_gone():
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def terminal_closed():
    master, slave = pty.openpty()
    os.close(master)
    return slave


def disk_full():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (reader_gone, "Broken pipe"),
        (terminal_closed, "Input/output error"),
        (disk_full, "No space left on device"),
    ],
)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_cannot_be_written_is_turned_off_once(monkeypatch, broken, reason, name):
    with os.fdopen(broken(), "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(streams, "turned_off", [])
        streams.never_fail()
        replaced = getattr(sys, name)
        assert replaced is not stream and replaced.encoding == stream.encoding
        streams.never_fail()
        assert getattr(sys, name) is replaced
        for _ in range(3):
            print("line\n" * 9999, file=replaced, flush=True)
            logging.StreamHandler(replaced).emit(logging.makeLogRecord({"msg": "record"}))
            with tqdm(total=2, file=replaced) as bar:
                bar.update()
        replaced.flush()  # as at exit
        assert streams.turned_off == [f"cannot write to {name} ({reason}); turned off"]


def test_a_stream_without_a_buffer_stays_so():
    """As under `python -u`: a line is there even if the process ends at once."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader, os.fdopen(write_end, "wb", buffering=0) as raw:
        unbuffered = io.TextIOWrapper(raw, write_through=True)
        print("line", file=streams.lenient(write_end, "stderr", unbuffered))
        assert reader.read(5) == b"line\n"


def test_a_reader_that_is_slow_gets_everything(monkeypatch):
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as a terminal that another program left so
    text = "0123456789" * 50_000
    with os.fdopen(read_end) as reader, ThreadPoolExecutor(1) as other:
        read = other.submit(reader.read)
        with os.fdopen(write_end, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            streams.never_fail()
            print(text, end="", flush=True)
        assert read.result() == text


def test_streams_in_memory_and_closed_ones_are_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    err = sys.stderr
    streams.never_fail()
    assert sys.stdout is None and sys.stderr is err


def test_the_log_has_the_lines_from_before_its_file(tmp_path, monkeypatch):
    log = logging.getLogger("sheepop_jax.a_test")
    log.setLevel(logging.INFO)
    monkeypatch.setattr(streams, "turned_off", [])
    for run in ("first", "second"):
        with RunLog() as run_log:
            log.info("%s early", run)
            only_in_file.info("%s metrics", run)
            assert (tmp_path / NAME).exists() == (run == "second")
            run_log.open(tmp_path)
            streams.turned_off.append("stderr is off")
            # Not by a logger: pytest would capture the line, and xdist cannot report it.
            run_log.emit(logging.makeLogRecord({"msg": "late \udce9\nand more"}))
    log.info("after")
    lines = (tmp_path / NAME).read_text().splitlines()
    expected = ["early", "metrics", "stderr is off", "late \\udce9", "and more"]
    assert len(lines) == 2 * len(expected)
    for line, end in zip(lines, 2 * expected, strict=True):
        assert line.endswith(end) and (end == "and more" or line[:2] == "20")
    with RunLog():  # of input that is refused
        log.info("never written")
    assert (tmp_path / NAME).read_text().splitlines() == lines


@pytest.mark.parametrize("blocked", [lambda p: p.symlink_to("/dev/full"), lambda p: p.mkdir()])
def test_a_log_that_cannot_be_written_is_turned_off(tmp_path, capsys, blocked):
    blocked(tmp_path / NAME)
    with RunLog() as run_log:
        run_log.open(tmp_path)
        for _ in range(3):
            only_in_file.info("a line")
    assert capsys.readouterr().err.count(f"{NAME}: turned off (") == 1
