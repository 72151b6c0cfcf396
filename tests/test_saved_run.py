"""A run of schema version 1 opens, evaluates and trains on; tests/saved_run holds it.

`train.py` made it, at the last commit before config.json had a schema version, from
tests/saved_run/text.txt; its `shards` was made relative by hand, and its log, lock and picture were
deleted.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sheepop_jax import pipeline
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.config.loading import load_saved_config
from sheepop_jax.config.schema import ADDED, SCHEMA
from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import generate
from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig
from tests.tiny import MACHINE, one_device

SAVED = Path(__file__).parent / "saved_run"

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A copy of the run, beside its text, in the current directory."""
    shutil.copytree(SAVED, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("run")


def test_it_has_neither_the_version_nor_the_fields_of_today():
    saved = json.loads((SAVED / "run/config.json").read_text())
    assert "schema" not in saved
    assert not {"norm", "head_dim"} & saved["config"]["model"].keys()


def test_an_added_field_has_the_value_that_reproduces_the_run(run):
    opened = open_run(run)
    for name, value in ADDED["model"].items():
        assert getattr(opened.config.model, name) == value
    assert opened.config == load_saved_config(run)


def test_it_writes_what_it_wrote(run):
    opened = open_run(run)
    params, step = opened.params()
    prompt = opened.tokenizer.encode("the sheep")
    settings = GenerationConfig(SamplingConfig(temperature=0.0), max_new_tokens=7)
    (completion,) = generate(opened.model(), params, [prompt], -1, settings)
    assert step == 30 and opened.tokenizer.decode(completion.tokens) == "       "


def test_it_trains_on_and_is_saved_with_a_version(run):
    before = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    config = load_saved_config(run, ["train.num_steps=32", "train.eval_every=1"])
    with one_device():
        figures = pipeline.train(config, run, MACHINE)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    after = [line["val_loss"] for line in lines if "val_loss" in line]
    np.testing.assert_allclose(after[0], before["val_loss"], rtol=1e-6)
    np.testing.assert_allclose(after[1:], before["val_loss"], rtol=0.02)
    assert len(after) == 3 and after[-1] == figures["val_loss"] != after[0]
    assert json.loads(Path("run/config.json").read_text())["schema"] == SCHEMA


def test_a_tokenizer_of_another_size_is_refused(run):
    other = json.loads((run / "tokenizer.json").read_text())
    other["model"]["vocab"].popitem()
    (run / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(InputError) as error:
        open_run(run)
    assert (error.value.field, error.value.got) == ("run/tokenizer.json", "22 tokens")


def test_a_run_of_a_newer_version_is_refused(run):
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**saved, "schema": SCHEMA + 1}))
    for opened in (open_run, load_saved_config):
        with pytest.raises(InputError) as error:
            opened(run)
        assert error.value.field == "run/config.json"
        assert f"schema: got {SCHEMA + 1}; expected at most {SCHEMA}" in str(error.value)
