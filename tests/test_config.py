"""Every field: there, typed, bounded, refused by name."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from configs import base
from sheepop_jax.config import Config
from sheepop_jax.errors import InputError

# One bad value and the rule it breaks, for each field whose rule needs no file or device. The
# others are refused where they are used: see OTHERS.
BAD = [
    ("seed", -1, "whole number"),
    ("model.d_model", 0, "at least 1"),
    ("model.num_layers", 0, "at least 1"),
    ("model.num_heads", 7, "divisor of model.d_model = 512"),
    ("model.num_kv_heads", 3, "divisor of model.num_heads = 8"),
    ("model.d_ff", -2, "at least 1"),
    ("model.max_seq_len", 0, "at least 1"),
    ("model.dropout", 1.0, r"\[0, 1\)"),
    ("model.attention_dropout", -0.1, r"\[0, 1\)"),
    ("model.activation", "gleu", "one of gelu"),
    ("model.position", "rop", "one of rope"),
    ("model.rope_theta", 0.0, "above 0"),
    ("model.norm_eps", float("inf"), "finite"),
    ("model.use_bias", 1, "type bool"),
    ("model.tie_embeddings", "yes", "type bool"),
    ("model.remat", None, "type bool"),
    ("data.source", "web", "one of auto"),
    ("data.path", 3, "type str"),
    ("data.name", 3, "type str"),
    ("data.subset", 3, "type str"),
    ("data.text_column", 3, "type str"),
    ("data.encoding_errors", "ignore", "one of strict"),
    ("data.tokenizer", "", "bpe, char or a path"),
    ("data.vocab_size", 256, "at least 257"),
    ("data.seq_len", 513, "model.max_seq_len = 512"),
    ("data.val_fraction", 1.0, r"\(0, 1\)"),
    ("data.val_split", "head", "one of auto"),
    ("data.cache_dir", 3, "type str"),
    ("optimizer.name", "sgd", "one of adamw"),
    ("optimizer.learning_rate", float("nan"), "above 0"),
    ("optimizer.b1", 1.0, r"\[0, 1\)"),
    ("optimizer.b2", -0.5, r"\[0, 1\)"),
    ("optimizer.eps", 0.0, "above 0"),
    ("optimizer.weight_decay", -0.1, "at least 0"),
    ("optimizer.warmup_steps", -1, "at least 0"),
    ("optimizer.schedule", "step", "one of cosine"),
    ("optimizer.final_lr_fraction", 1.5, r"\[0, 1\]"),
    ("optimizer.max_grad_norm", float("inf"), "finite"),
    ("train.platform", "gpu", "one of auto"),
    ("train.num_steps", 0, "exactly one of"),
    ("train.num_epochs", 2, "exactly one of"),
    ("train.batch_size", 0, "at least 1"),
    ("train.grad_accum_steps", 0, "at least 1"),
    ("train.dtype", "float16", "one of auto"),
    ("train.log_every", 0, "at least 1"),
    ("train.eval_every", -1, "at least 0"),
    ("train.eval_batches", -1, "at least 0"),
    ("train.sample_prompt", 3, "type str"),
    ("train.sample_tokens", -1, "at least 0"),
    ("train.max_skipped_steps", 0, "at least 1"),
    ("checkpoint.save_every", -1, "at least 0"),
    ("checkpoint.keep", 0, "at least 1"),
    ("mesh.data", 0, "at least 1, or -1"),
    ("mesh.fsdp", -2, "at least 1, or -1"),
    ("mesh.tensor", -1, "at most one axis of -1"),
]


def flat(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def with_value(name, value):
    """base.py as plain dicts with one value changed, of whatever type."""
    values = base.get_config().to_dict()
    *sections, field = name.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[field] = value
    return values


# The last values that are still good.
EDGES = [
    ("seed", 0),
    ("seed", 2**32 - 1),
    ("model.num_layers", 1),
    ("model.dropout", 0.0),
    ("data.vocab_size", 257),
    ("data.seq_len", 512),
    ("optimizer.b1", 0.0),
    ("optimizer.weight_decay", 0.0),
    ("optimizer.warmup_steps", 0),
    ("optimizer.final_lr_fraction", 0.0),
    ("optimizer.final_lr_fraction", 1.0),
    ("optimizer.max_grad_norm", 0.0),
    ("train.num_steps", 1),
    ("train.batch_size", 1),
    ("train.eval_every", 0),
    ("train.sample_tokens", 0),
    ("train.max_skipped_steps", 1),
    ("checkpoint.save_every", 0),
    ("checkpoint.keep", 1),
    ("mesh.fsdp", 1),
]


@pytest.mark.parametrize(("name", "value"), EDGES)
def test_values_at_the_edge_of_a_rule_are_good(name, value):
    assert flat(ConfigDict(Config.from_dict(with_value(name, value)).to_dict()))[name] == value


def test_base_is_valid_and_survives_json():
    config = Config.from_dict(base.get_config())
    assert Config.from_dict(config.to_dict()) == config


def test_every_field_has_a_bad_value():
    assert sorted(name for name, _, _ in BAD) == sorted(flat(base.get_config()))


@pytest.mark.parametrize(("name", "value", "rule"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_values_are_refused_by_name_value_and_rule(name, value, rule):
    with pytest.raises(InputError, match=rule) as caught:
        Config.from_dict(with_value(name, value))
    shown = "train.num_steps" if name == "train.num_epochs" else name
    assert str(caught.value).startswith(f"{shown}: got ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32),
        ("data.vocab_size", 2**31),
        ("data.val_fraction", 0.0),
        ("optimizer.weight_decay", float("inf")),
        ("optimizer.final_lr_fraction", -0.1),
        ("optimizer.max_grad_norm", -0.1),
    ],
)
def test_the_other_end_of_a_rule_is_refused_too(name, value):
    with pytest.raises(InputError, match=f"^{name}: got "):
        Config.from_dict(with_value(name, value))


@pytest.mark.parametrize("name", sorted(flat(base.get_config())))
def test_a_missing_field_is_named(name):
    values = base.get_config().to_dict()
    *sections, field = name.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    del inner[field]
    with pytest.raises(InputError, match=f"^{name}: got 'nothing'"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("name", "near"),
    [("model.d_modle", "model.d_model"), ("trian", "train"), ("optimizer.lr", "one of name")],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(name, near):
    with pytest.raises(InputError, match=f"^{name}: got .*try {near}"):
        Config.from_dict(with_value(name, 3))


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_a_section_must_have_fields(section):
    with pytest.raises(InputError, match=f"^{section}: got 5; expected a section"):
        Config.from_dict({**base.get_config().to_dict(), section: 5})


def test_whole_numbers_are_taken_for_floats_but_not_the_other_way():
    assert Config.from_dict(with_value("model.dropout", 0)).model.dropout == 0.0
    with pytest.raises(InputError, match="type int"):
        Config.from_dict(with_value("model.num_layers", 2.0))
    with pytest.raises(InputError, match="type int"):
        Config.from_dict(with_value("model.num_layers", True))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model.d_model": 24, "model.num_heads": 8}, "even head width for rope"),
        ({"model.d_model": 9, "model.num_heads": 1, "model.position": "sinusoidal"}, "even width"),
        ({"data.source": "files"}, "data.path: got ''"),
        ({"data.source": "hub"}, "data.name: got ''"),
        ({"data.source": "hub", "data.name": "x", "data.text_column": ""}, "data.text_column"),
        ({"train.num_steps": 5, "train.num_epochs": 5}, "exactly one"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh.fsdp"),
    ],
)
def test_fields_that_contradict_each_other(changes, rule):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=rule):
        Config.from_dict(config)


def test_the_size_of_a_vocabulary_of_characters_is_free():
    values = with_value("data.vocab_size", 0)
    values["data"]["tokenizer"] = "char"
    assert Config.from_dict(values).data.vocab_size == 0


def test_a_configuration_cannot_be_changed():
    config = Config.from_dict(base.get_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({}, "stdlib"),
        ({"data.path": "x"}, "files"),
        ({"data.name": "x"}, "hub"),
        ({"data.path": "x", "data.name": "y"}, "files"),
        ({"data.path": "x", "data.source": "stdlib"}, "stdlib"),
    ],
)
def test_auto_source(changes, source):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    assert Config.from_dict(config).data.resolved_source == source


def test_head_width_and_groups():
    config = Config.from_dict(base.get_config()).model
    assert (config.head_dim, config.kv_heads) == (64, 8)
    assert dataclasses.replace(config, num_kv_heads=2).kv_heads == 2
