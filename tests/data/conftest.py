"""A small corpus in files, a `DataConfig` over it, and the texts back from a stream."""

from functools import partial

import numpy as np
import pytest

from sheepop_jax.data import stream
from sheepop_jax.data import tokenizer as tokenizer_module
from sheepop_jax.data.loader import EvaluationBatches, PackingConfig
from sheepop_jax.data.preprocess import encode
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.sources import paths
from sheepop_jax.data.windows import MixtureSampler
from tests.data.preparing import UNIT_BYTES

WORDS = ["sheep", "grass", "hill", "and", "the", "wool\n", "  ", "r\u00e9\U0001f411"]


def write_texts(directory):
    """31 files."""
    directory.mkdir()
    generator = np.random.default_rng(5)
    for i in range(31):
        path = directory / f"{i:02}.txt"
        path.write_text(" ".join(generator.choice(WORDS, 41)), encoding="utf-8", newline="")


def make_data_config(make_config, directory, **fields):
    """A `DataConfig` over directory/text with its cache in directory/cache."""
    here = {"path": str(directory / "text"), "cache_dir": str(directory / "cache")}
    fields = {**here, "val_split": "document", "val_fraction": 0.2, **fields}
    if "mixture" in fields:
        fields["path"] = ""
    return make_config({f"data.{name}": value for name, value in fields.items()}).data


def hurry(patch):
    """Nothing waits for the disk, and a file that was written just now may be remembered."""
    patch.setattr("os.fsync", lambda file: None)  # takes 50 ms on a busy disk
    patch.setattr(paths, "_SETTLED_SECONDS", 0)


@pytest.fixture
def data_config(tmp_path, make_config, monkeypatch):
    """A `DataConfig` over tmp_path/text (31 files) with its cache in tmp_path/cache."""
    hurry(monkeypatch)
    write_texts(tmp_path / "text")
    return partial(make_data_config, make_config, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, make_config):
    """The same texts prepared in some ten units by a process alone; not to be changed."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_texts(root / "text")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setattr(encode, "_UNIT_BYTES", UNIT_BYTES)
        return prepare(make_data_config(make_config, root))


@pytest.fixture
def small_pieces(monkeypatch):
    """Borders of units, batches and pieces fall within every text."""
    monkeypatch.setattr(encode, "_UNIT_BYTES", 61)
    monkeypatch.setattr(stream, "_BATCH_CHARS", 17)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 29)


class Still:
    """In place of grain's shuffle, which takes 0.2 ms a window."""

    def __getitem__(self, turn):
        return 0, 0


@pytest.fixture
def unshuffled(monkeypatch):
    """Only whose turn it is counts."""
    monkeypatch.setattr(MixtureSampler, "_shuffle", lambda self, source: Still())


@pytest.fixture
def documents_of():
    """`documents_of(stream, tokenizer)`: its texts, through evaluation windows."""

    def documents(found, tokenizer):
        tokens = [int(found.read(0, 1)[0])]
        layout = PackingConfig(7, tokenizer.end_of_text)
        for batch in EvaluationBatches(found, layout, batch_size=3, overlap=2):
            tokens += batch.targets[batch.weights > 0].tolist()
        assert tokens[0] == tokens[-1] == tokenizer.end_of_text
        ends = [i for i, token in enumerate(tokens) if token == tokenizer.end_of_text]
        spans = zip(ends, ends[1:], strict=False)
        return [tokenizer.decode(tokens[start + 1 : stop]) for start, stop in spans]

    return documents


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
