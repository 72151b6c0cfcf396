"""A small corpus in files, a `DataConfig` over it, and the texts back from a stream."""

import json
import subprocess
import sys

import numpy as np
import pytest

from sheepop_jax.data import encode, stream
from sheepop_jax.data import tokenizer as tokenizer_module
from sheepop_jax.data.batches import EvaluationBatches, Layout
from sheepop_jax.data.sources import paths
from tests.data.preparing import CHILD, ROOT, UNIT_BYTES

WORDS = ["sheep", "grass", "hill", "and", "the", "wool\n", "  ", "r\u00e9\U0001f411"]


@pytest.fixture
def data_config(tmp_path, make_config, monkeypatch):
    """A `DataConfig` over tmp_path/text (31 files) with its cache in tmp_path/cache."""
    monkeypatch.setattr("os.fsync", lambda file: None)  # takes 50 ms on a busy disk
    monkeypatch.setattr(paths, "_SETTLED_SECONDS", 0)
    text = tmp_path / "text"
    text.mkdir()
    generator = np.random.default_rng(5)
    for i in range(31):
        path = text / f"{i:02}.txt"
        path.write_text(" ".join(generator.choice(WORDS, 41)), encoding="utf-8", newline="")

    def make(**fields):
        here = {"path": str(text), "cache_dir": str(tmp_path / "cache")}
        fields = {**here, "val_split": "document", "val_fraction": 0.2, **fields}
        if "mixture" in fields:
            fields["path"] = ""
        return make_config({f"data.{name}": value for name, value in fields.items()}).data

    return make


@pytest.fixture
def small_pieces(monkeypatch):
    """Borders of units, batches and pieces fall within every text."""
    monkeypatch.setattr(encode, "_UNIT_BYTES", 61)
    monkeypatch.setattr(stream, "_BATCH_CHARS", 17)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 29)


@pytest.fixture
def documents_of():
    """`documents_of(stream, tokenizer)`: its texts, through evaluation windows."""

    def documents(found, tokenizer):
        tokens = [int(found.read(0, 1)[0])]
        layout = Layout(7, tokenizer.end_of_text)
        for batch in EvaluationBatches(found, layout, batch_size=3, overlap=2):
            tokens += batch.targets[batch.weights > 0].tolist()
        assert tokens[0] == tokens[-1] == tokenizer.end_of_text
        ends = [i for i, token in enumerate(tokens) if token == tokenizer.end_of_text]
        spans = zip(ends, ends[1:], strict=False)
        return [tokenizer.decode(tokens[start + 1 : stop]) for start, stop in spans]

    return documents


@pytest.fixture
def start(process_env):
    """`start(config, …)`: a real process that prepares."""
    started = []

    def start(config, **options):
        given = {"config": config.__dict__, "unit_bytes": UNIT_BYTES, **options}
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(given)],
            cwd=ROOT,
            env=process_env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def config(data_config, monkeypatch):
    """As `data_config`, in some ten units."""
    monkeypatch.setattr(encode, "_UNIT_BYTES", UNIT_BYTES)
    return data_config


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of the units that are encoded in this process, as it goes on."""
    numbers = []
    inner = encode._encode_unit

    def note(directory, unit, *rest):
        numbers.append(unit.number)
        inner(directory, unit, *rest)

    monkeypatch.setattr(encode, "_encode_unit", note)
    return numbers
