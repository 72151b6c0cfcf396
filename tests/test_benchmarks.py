"""The benchmarks start and explain themselves; what they measure is in BENCHMARKS.md."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.lib import contest
from benchmarks.lib.contest import Contender, take_turns

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


def run(*words):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


# Each program as `python benchmarks/NAME --help` would run it, but in one interpreter: with its own
# folder on the path, and with modules of ours to import anew.
HELP = """
import contextlib, io, json, runpy, sys
from pathlib import Path

help, before = {}, sys.path[1:]
for program in sys.argv[1:]:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("benchmarks", "sheepop_jax", "configs"):
            del sys.modules[name]
    sys.path[:] = [str(Path(program).parent), *before]
    sys.argv = [program, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            assert end.code in (0, None), program
    help[Path(program).name] = out.getvalue()
print(json.dumps(help))
"""


def test_each_explains_itself(tmp_path):
    command = [sys.executable, "-c", HELP, *(str(ROOT / "benchmarks" / name) for name in PROGRAMS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    texts = json.loads(result.stdout)
    assert list(texts) == PROGRAMS
    for name, text in texts.items():
        assert text.startswith(f"usage: {name}") and len(text.splitlines()) > 4, name


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_stands_in_the_document(name):
    assert f"benchmarks/{name}" in (ROOT / "BENCHMARKS.md").read_text()


@pytest.mark.slow
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
    assert found["rows"][1]["time / whole"] == 1
    header, line, *rows = result.stdout.split("\n\n")[0].splitlines()
    assert header.startswith("| tokens | loss | ms |") and line.startswith("| --: | :-- | --: |")
    assert len(rows) == 2 and found["about"]["jax"] in result.stdout


def contender(tmp_path, name, ready):
    """A shell script that says what it is told to when it is ready, and then takes turns."""
    script = tmp_path / name
    answer = "echo '{\"seconds\": 0.5}'"
    script.write_text(
        f"#!/bin/sh\n{ready}\nwhile read line; do {answer}; done\necho '{{\"peak_MB\": 1}}'\n"
    )
    script.chmod(0o755)
    return Contender(name, "none", python=str(script))


@pytest.fixture
def clock(monkeypatch):
    """`clock(0, 5, …)`: what the contest reads from its clock, one reading after another."""

    def set_to(*readings):
        later = iter(readings)
        fake = SimpleNamespace(monotonic=lambda: next(later), time=time.time)
        monkeypatch.setattr(contest, "time", fake)

    return set_to


def test_a_contest_ends_in_time_with_those_that_are_ready(tmp_path, capfd, clock):
    """Its end, the readiness of both, and each turn after the first that counts are clocked."""
    quick = contender(tmp_path, "quick", "echo '{}'")
    silent = contender(tmp_path, "silent", "exec sleep 600")
    clock(0, 0, 600, 599, 601)
    assert take_turns([quick, silent], 500, within=600) == [quick]
    assert quick.seconds == [0.5, 0.5] and quick.about == {"peak_MB": 1}
    said = capfd.readouterr().err
    assert "silent: left out" in said and "no time for more than 2 of 500 turns" in said
    clock(0, 600)
    with pytest.raises(SystemExit, match="silent could not start"):
        take_turns([silent, quick], 1, within=600)


def test_a_contender_that_cannot_start(tmp_path, capfd):
    here = contender(tmp_path, "here", "echo '{}'")
    missing = Contender("missing", "none", python="false")
    with pytest.raises(SystemExit, match="missing could not start"):
        take_turns([missing, here], 1)
    assert take_turns([here, missing], 3) == [here]
    assert here.seconds == [0.5] * 3  # and not the first turn, which does not count
    assert "missing: left out" in capfd.readouterr().err
