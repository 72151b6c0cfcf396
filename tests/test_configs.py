"""Every shipped configuration: valid, and good for one train step, without running it."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from sheepop_jax.config.loading import load_config
from sheepop_jax.config.schema import Config
from sheepop_jax.data.batch import Batch
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import init_state, make_train_step

DOCS = Path(__file__).parent.parent / "docs"
NAMES = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.py"))


def load(name):
    return Config.from_dict(importlib.import_module(f"configs.{name}").get_config())


def test_the_promised_configurations_are_there():
    promised = (
        "base quickstart shakespeare_char wikitext103 gpt2_124m modern_124m mixture tinystories"
    )
    assert set(promised.split()) | {"openwebtext", "fineweb_edu"} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_every_line_is_a_difference(name):
    """Each `c.section.field = value` changes what the configuration begins with."""
    module = importlib.import_module(f"configs.{name}")
    (parent,) = [value for value in vars(module).values() if inspect.ismodule(value)]
    before = parent.get_config().to_dict()
    lines = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if assigns(node)]
    assert lines
    for line in lines:
        _, section, field = ast.unparse(line.targets[0]).split(".", 2)
        after = module.get_config().to_dict()[section]
        assert before[section].get(field, ...) != after.get(field), ast.unparse(line)


def assigns(node):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)


@pytest.mark.parametrize("name", NAMES)
def test_a_train_step_under_eval_shape(name):
    """With two of the layers, which are all alike: each takes long to trace."""
    config = load(name)
    vocab_size = min(config.data.vocab_size, 50257)
    layers = min(config.model.num_layers, 2)
    model = Transformer(dataclasses.replace(config.model, num_layers=layers), vocab_size)
    schedule = make_schedule(config.optimizer, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_train_step(model, optimizer, schedule, config.seed)
    shape = (config.train.grad_accum_steps, config.train.batch_size, config.data.seq_len)
    batch = Batch(
        jax.ShapeDtypeStruct(shape, np.int32),
        jax.ShapeDtypeStruct(shape, np.int32),
        jax.ShapeDtypeStruct(shape, np.float32),
        jax.ShapeDtypeStruct(shape, np.int32) if config.data.document_mask else None,
    )
    state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
    after, metrics = jax.eval_shape(step, state, batch)
    assert after == state
    assert metrics.loss.shape == ()


def counts_in_the_documents():
    """(preset, overrides, millions as written) of each count in the tables of the documents."""
    page = (DOCS / "configuration.md").read_text()
    shown = [(n, "", m) for n, m in re.findall(r"^\| `(\w+)` \| .*? ([\d.]+)M ", page, re.M)]
    started = (DOCS / "getting-started.md").read_text()
    shown += [(n, "", m) for n, m in re.findall(r"^\| `(\w+)` \| ([\d.]+)M \|", started, re.M)]
    more = r"^\| `(\w+)` with ([\d.]+)M parameters \| `(.*)` \|"
    return shown + [(n, words, m) for n, m, words in re.findall(more, page, re.M)]


def test_most_presets_and_some_changes_have_a_count():
    assert {name for name, words, _ in counts_in_the_documents() if not words} == {
        *("base", "quickstart", "shakespeare_char", "tinystories", "gpt2_124m", "modern_124m")
    }
    assert len(counts_in_the_documents()) >= 11


@pytest.mark.parametrize(("name", "words", "millions"), counts_in_the_documents())
def test_parameter_counts_in_the_documents(name, words, millions):
    """As `plan` counts them."""
    config = load_config(name, [word.removeprefix("--config.") for word in words.split()])
    vocab_size = config.data.vocab_size if config.data.tokenizer == "bpe" else 65  # of Shakespeare
    model = Transformer(config.model, vocab_size)
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    digits = len(millions.partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == millions
