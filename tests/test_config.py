"""Every field: there, typed, bounded, refused by name."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from configs import base
from sheepop_jax.config import Config
from sheepop_jax.data_config import SOURCE_FIELDS, DataConfig
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
    ("model.remat", "some", "one of none"),
    ("data.source", "web", "one of auto"),
    ("data.path", 3, "type str"),
    ("data.val_path", "held_out.txt", "data.path set too"),
    ("data.name", 3, "type str"),
    ("data.subset", 3, "type str"),
    ("data.text_column", 3, "type str"),
    ("data.join_rows", 1, "type bool"),
    ("data.query", 3, "type str"),
    ("data.mixture", 3, "type dict"),
    ("data.encoding_errors", "ignore", "one of strict"),
    ("data.gitignore", "no", "type bool"),
    ("data.max_file_bytes", -1, "at least 0"),
    ("data.max_bytes", -1, "at least 0"),
    ("data.tokenizer", "", "bpe, char or a path"),
    ("data.vocab_size", 256, "at least 257"),
    ("data.tokenizer_sample_bytes", 0, "at least 1"),
    ("data.seq_len", 513, "model.max_seq_len = 512"),
    ("data.packing", "one", "one of stream"),
    ("data.document_mask", 1, "type bool"),
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
    ("optimizer.max_grad_zscore", -1.0, "at least 0"),
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
    ("train.profile_steps", -1, "at least 0"),
    ("checkpoint.save_every", -1, "at least 0"),
    ("checkpoint.keep", 0, "at least 1"),
    ("mesh.data", 0, "at least 1, or -1"),
    ("mesh.fsdp", -2, "at least 1, or -1"),
    ("mesh.tensor", -1, "at most one axis of -1"),
]


def flat(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict) and name != "mixture":  # a field, whose content is free
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
    ("data.tokenizer_sample_bytes", 1),
    ("data.max_file_bytes", 0),
    ("data.max_bytes", 0),
    ("optimizer.b1", 0.0),
    ("optimizer.weight_decay", 0.0),
    ("optimizer.warmup_steps", 0),
    ("optimizer.final_lr_fraction", 0.0),
    ("optimizer.final_lr_fraction", 1.0),
    ("optimizer.max_grad_norm", 0.0),
    ("optimizer.max_grad_zscore", 0.0),
    ("train.num_steps", 1),
    ("train.batch_size", 1),
    ("train.eval_every", 0),
    ("train.sample_tokens", 0),
    ("train.max_skipped_steps", 1),
    ("train.profile_steps", 0),
    ("checkpoint.save_every", 0),
    ("checkpoint.keep", 1),
    ("mesh.fsdp", 1),
]


@pytest.mark.parametrize(("name", "value"), EDGES)
def test_values_at_the_edge_of_a_rule_are_good(name, value):
    config = Config.from_dict(with_value(name, value))
    assert flat(ConfigDict(config.to_dict()))[name] == value


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
        ("data.vocab_size", 2**20 + 1),
        ("optimizer.b2", 0.99999999),  # 1 in float32
        ("data.seq_len", 0),
        ("data.vocab_size", -1),
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
        ({"data.source": "pdf"}, "data.path: got ''"),
        ({"data.source": "json"}, "data.path: got ''"),
        ({"data.source": "csv"}, "data.path: got ''"),
        ({"data.source": "parquet"}, "data.path: got ''"),
        ({"data.source": "sql"}, "data.path: got ''"),
        ({"data.source": "sql", "data.path": "x.db"}, "data.query: got ''; expected a SELECT"),
        ({"data.path": "x.db"}, "data.query: got ''; expected a SELECT"),
        ({"data.source": "hub"}, "data.name: got ''"),
        ({"data.source": "hub", "data.name": "x", "data.text_column": ""}, "data.text_column"),
        ({"data.name": "x", "data.text_column": ""}, "data.text_column"),
        ({"data.path": "x.jsonl", "data.text_column": ""}, "data.text_column"),
        ({"data.source": "csv", "data.path": "x", "data.text_column": ""}, "data.text_column"),
        ({"data.name": "x", "data.val_path": "y"}, "data.val_path: got 'y'; .*data.path set too"),
        (
            {"data.path": "x.db", "data.query": "SELECT 1", "data.val_path": "y"},
            'data.val_path: got .y.; expected "" for source=sql',
        ),
        (
            {"data.source": "hub", "data.name": "n", "data.path": "x", "data.val_path": "y"},
            'data.val_path: got .y.; expected "" for source=hub',
        ),
        (
            {"data.source": "stdlib", "data.path": "x", "data.val_path": "y"},
            'data.val_path: got .y.; expected "" for source=stdlib',
        ),
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
        config.model.d_model = 3


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({}, "stdlib"),
        ({"data.path": "x"}, "files"),
        ({"data.name": "x"}, "hub"),
        ({"data.path": "x", "data.name": "y"}, "files"),
        ({"data.path": "x", "data.source": "stdlib"}, "stdlib"),
        ({"data.path": "x.txt", "data.val_path": "y.txt"}, "files"),
        ({"data.path": "x.jsonl"}, "json"),
        ({"data.path": "x.ndjson.gz"}, "json"),
        ({"data.path": "x.JSONL.GZ"}, "json"),
        ({"data.path": "x.json"}, "json"),
        ({"data.path": "x.csv"}, "csv"),
        ({"data.path": "x.tsv.zst"}, "csv"),
        ({"data.path": "d/*.parquet"}, "parquet"),
        ({"data.path": "https://host/x.parquet?download=true&n=a.b"}, "parquet"),
        ({"data.path": "x.csv?n=1"}, "files"),
        ({"data.path": "a.csv, b.tsv.xz,"}, "csv"),
        ({"data.path": "a.csv,b.txt"}, "files"),
        ({"data.path": "a.csv,b.jsonl"}, "files"),
        ({"data.path": ","}, "files"),
        ({"data.path": "x.txt.bz2"}, "files"),
        ({"data.path": "x.gz"}, "files"),
        ({"data.path": "x.PDF"}, "pdf"),
        ({"data.path": "x.db", "data.query": "q"}, "sql"),
        ({"data.path": "x.sqlite", "data.query": "q"}, "sql"),
        ({"data.path": "x.sqlite3", "data.query": "q"}, "sql"),
        ({"data.path": "sqlite:///x", "data.query": "q"}, "sql"),
        ({"data.path": "postgresql://u@host/db", "data.query": "q"}, "sql"),
        ({"data.path": "postgres://u@host/db", "data.query": "q"}, "sql"),
    ],
)
def test_auto_source(changes, source):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    assert Config.from_dict(config).data.resolved_source == source


class TestMixture:
    GOOD = {"a": {"weight": 1, "path": "a/"}, "b": {"weight": 3.0, "name": "n", "max_bytes": 5}}

    def test_each_part_is_the_section_with_its_own_fields(self):
        values = with_value("data.mixture", self.GOOD)
        values["data"] |= {"text_column": "body", "max_bytes": 9}
        config = Config.from_dict(values)
        assert Config.from_dict(config.to_dict()) == config
        first, second = config.data.parts
        assert (first.name, first.weight, second.name, second.weight) == ("a", 0.25, "b", 0.75)
        same = dataclasses.replace(config.data, mixture={})
        assert first.config == dataclasses.replace(same, path="a/")
        assert second.config == dataclasses.replace(same, name="n", max_bytes=5)

    def test_a_config_dict_will_do(self):
        values = base.get_config()
        values.data.mixture = ConfigDict(self.GOOD)
        assert Config.from_dict(values).data.mixture == self.GOOD

    def test_no_mixture_is_one_part(self):
        data = Config.from_dict(base.get_config()).data
        assert data.parts == [("", 1.0, data)]

    @pytest.mark.parametrize("field", ["path", "name", "query", "val_path"])
    def test_a_source_beside_it_is_refused(self, field):
        values = with_value("data.mixture", self.GOOD)
        values["data"][field] = "x"
        with pytest.raises(InputError, match=f'^data.{field}: got .x.; expected "" beside'):
            Config.from_dict(values)

    @pytest.mark.parametrize(
        ("part", "said"),
        [
            (3, "m: got 3; expected a section with a weight .*; try {"),
            ({"path": "a"}, "m: got {'path': 'a'}; expected a section with a weight"),
            ({"weight": 0.0, "path": "a"}, "m.weight: got 0.0; expected a finite number above 0"),
            ({"weight": -1, "path": "a"}, "m.weight: got -1; expected a finite"),
            ({"weight": float("nan"), "path": "a"}, "m.weight: got nan; expected a finite"),
            ({"weight": float("inf"), "path": "a"}, "m.weight: got inf; expected a finite"),
            ({"weight": True, "path": "a"}, "m.weight: got True; expected a value of type float"),
            ({"weight": "1", "path": "a"}, "m.weight: got '1'; expected a value of type float"),
            ({"weight": 1, "path": 3}, "m.path: got 3; expected a value of type str"),
            ({"weight": 1, "path": "a", "join_rows": 1}, "m.join_rows: got 1; .*type bool"),
            ({"weight": 1, "path": "a", "max_bytes": 1.0}, "m.max_bytes: got 1.0; .*type int"),
            ({"weight": 1, "path": "a", "max_bytes": True}, "m.max_bytes: got True; .*type int"),
            ({"weight": 1, "pth": "a"}, "m.pth: got 'a'; .*weight or a field.*try path$"),
            ({"weight": 1, "x": "a"}, "m.x: got 'a'; .*try one of source, path"),
            ({"weight": 1, "path": "a", "seq_len": 3}, "m.seq_len: got 3; .*a field of a source"),
            ({"weight": 1}, "m: got 'no source'; expected data.path, data.name or source=stdlib"),
            ({"weight": 1, "source": "hub"}, "m: got .*data.name: got ''"),
            ({"weight": 1, "source": "web"}, "m: got .*data.source: got 'web'"),
        ],
    )
    def test_bad_parts_are_refused_by_name(self, part, said):
        with pytest.raises(InputError, match=f"^data.mixture.{said}") as caught:
            Config.from_dict(with_value("data.mixture", {"m": part}))
        assert "\n" not in str(caught.value)

    def test_the_standard_library_may_be_a_part(self):
        mixture = {"m": {"weight": 1, "source": "stdlib"}, **self.GOOD}
        parts = Config.from_dict(with_value("data.mixture", mixture)).data.parts
        assert [part.config.resolved_source for part in parts] == ["stdlib", "files", "hub"]

    def test_every_field_of_a_source_may_be_set(self):
        fields = {field.name for field in dataclasses.fields(DataConfig)}
        assert set(SOURCE_FIELDS) < fields
        assert "mixture" not in SOURCE_FIELDS


def test_head_width_and_groups():
    config = Config.from_dict(base.get_config()).model
    assert (config.head_dim, config.kv_heads) == (64, 8)
    assert dataclasses.replace(config, num_kv_heads=2).kv_heads == 2
