"""The benchmarks start and explain themselves; what they measure is in BENCHMARKS.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
