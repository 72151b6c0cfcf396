"""The benchmarks start and explain themselves; what they measure is in BENCHMARKS.md."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.lib.contest import Contender, take_turns

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


def run(*words):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_explains_itself(name):
    result = run(ROOT / "benchmarks" / name, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert "usage:" in result.stdout and len(result.stdout.splitlines()) > 4


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_stands_in_the_document(name):
    assert f"benchmarks/{name}" in (ROOT / "BENCHMARKS.md").read_text()


def test_the_data_benchmark_on_a_tiny_corpus(tmp_path):
    words = ["--gigabytes", "0.0015", "--vocab_size", "300", "--workdir", tmp_path]
    result = run(ROOT / "benchmarks" / "data.py", *words)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "0.0015",
        "prepare",
        "compare",
        "load",
    ]
    again = run(ROOT / "benchmarks" / "data.py", *words, "--only", "load")
    assert json.loads(again.stdout)["tokens_M_per_s"] > 0


@pytest.mark.slow
def test_a_contest_from_command_to_table(tmp_path):
    words = ["--time", "16", "--batch", "1", "--turns", "2", "--platform", "cpu"]
    result = run(ROOT / "benchmarks" / "loss.py", *words, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "loss.json").read_text())
    assert [row["loss"] for row in found["rows"]] == ["chunked", "whole"]
    assert all(row["ms"] > 0 and row["peak, MB"] > 100 for row in found["rows"])
    assert found["rows"][1]["time, of whole"] == 1
    header, line, *rows = result.stdout.split("\n\n")[0].splitlines()
    assert header.startswith("| tokens | loss | ms |") and line.startswith("| --: | :-- | --: |")
    assert len(rows) == 2 and found["about"]["jax"] in result.stdout


def contender(tmp_path, name, ready, turn):
    """A shell script that is ready after so many seconds, and takes so many for a turn."""
    script = tmp_path / name
    answer = f"sleep {turn}; echo '{{\"seconds\": {turn}}}'"
    script.write_text(
        f"#!/bin/sh\nsleep {ready}; echo '{{}}'\nwhile read line; do {answer}; done\n"
        "echo '{\"peak_MB\": 1}'\n"
    )
    script.chmod(0o755)
    return Contender(name, "none", python=str(script))


def test_a_contest_ends_in_time_with_those_that_are_ready(tmp_path, capfd):
    quick, slow = contender(tmp_path, "quick", 0, 0.2), contender(tmp_path, "slow", 60, 0)
    started = time.monotonic()
    assert take_turns([quick, slow], 500, within=1.0) == [quick]
    assert time.monotonic() - started < 10
    assert 1 <= len(quick.seconds) < 50 and quick.about == {"peak_MB": 1}
    said = capfd.readouterr().err
    assert "slow: left out" in said and "no time for more than" in said
    with pytest.raises(SystemExit, match="slow could not start"):
        take_turns([slow, quick], 1, within=0.2)
    again = contender(tmp_path, "quick", 0, 0)
    assert take_turns([again], 3) == [again] and len(again.seconds) == 3


def test_a_contender_that_cannot_start(capfd):
    words = ["loss", "small", "--platform", "cpu"]
    here, missing = Contender("here", "ours", words), Contender("missing", "ours", words, "false")
    with pytest.raises(SystemExit, match="missing could not start"):
        take_turns([missing, here], 1)
    [only] = take_turns([here, missing], 2)
    assert only is here and len(here.seconds) == 2 and min(here.seconds) > 0
    assert "missing: left out" in capfd.readouterr().err
