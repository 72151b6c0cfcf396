"""Every field: there, typed, bounded. A bad value of each field is in test_errors.py."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from sheepop_jax.config.data import SOURCE_FIELDS, DataConfig
from sheepop_jax.config.loading import (
    PRESETS,
    default_workdir,
    load_config,
    load_saved_config,
)
from sheepop_jax.config.schema import ADDED, Config
from sheepop_jax.config.suggestions import ALIASES, suggest
from sheepop_jax.errors import InputError


def flat(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted names and values of all fields."""
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


def refused(values):
    """The error of a configuration."""
    with pytest.raises(InputError) as caught:
        Config.from_dict(values)
    return caught.value


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


@pytest.mark.parametrize("name", sorted(flat(base.get_config())))
def test_a_missing_field_is_named(name):
    values = base.get_config().to_dict()
    *sections, field = name.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    del inner[field]
    error = refused(values)
    assert (error.field, error.got) == (name, "nothing")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("model.d_modle", "model.d_model"),
        ("trian", "train"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("optimizer.foo", "one of name"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(name, near):
    error = refused(with_value(name, 3))
    assert error.field == name
    assert error.hint.startswith(near)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        # By another library's name, wherever it was typed.
        ("train.lr", "`optimizer.learning_rate`"),
        ("n_layer", "`model.num_layers`"),
        ("model.num-hidden-layers", "`model.num_layers`"),
        ("model.block_size", "`data.seq_len` and `model.max_seq_len`"),
        ("train.per_device_train_batch_size", "`train.batch_size`, over all devices"),
        ("out_dir", "`workdir`"),
        ("compile", "leaving it out: every step is compiled"),
        # In another section, misspelled, or both.
        ("train.d_model", "`model.d_model`"),
        ("learning_rate", "`optimizer.learning_rate`"),
        ("modle.dropuot", "`model.dropout`"),
        ("optimizer.nam", "`optimizer.name`"),
        ("model", "one of its fields, such as `model.activation`"),
        # Nothing is better than a wrong field; `name` is in two sections.
        ("train.name", ""),
        ("model.vocab", ""),
        ("num_workers", ""),
        ("train.x", ""),
    ],
)
def test_the_suggestion_for_an_unknown_field(typed, hint):
    assert suggest(typed, flat(base.get_config())) == hint


def test_every_alias_names_a_field_and_is_none():
    fields = flat(base.get_config()).keys()
    last_parts = {name.rpartition(".")[2] for name in fields}
    for alias, target in ALIASES.items():
        named = re.findall("`([^`]+)`", target) or ([] if " " in target else [target])
        assert set(named) <= {*fields, "workdir"}, alias
        assert alias not in last_parts and alias == alias.lower()


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_a_section_must_have_fields(section):
    error = refused({**base.get_config().to_dict(), section: 5})
    assert (error.field, error.got) == (section, 5)


def test_whole_numbers_are_taken_for_floats():
    """The other way is refused, in test_errors.py."""
    assert Config.from_dict(with_value("model.dropout", 0)).model.dropout == 0.0


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"model.d_model": 24, "model.num_heads": 8}, "model.num_heads", "even head width"),
        (
            {"model.d_model": 24, "model.num_heads": 4, "model.num_kv_heads": 3},
            "model.num_kv_heads",
            "divisor of 4 (model.num_heads)",
        ),
        (
            {"model.d_model": 9, "model.num_heads": 1, "model.position": "sinusoidal"},
            "model.d_model",
            "even width",
        ),
        ({"data.source": "files"}, "data.path", ""),
        ({"data.source": "pdf"}, "data.path", ""),
        ({"data.source": "json"}, "data.path", ""),
        ({"data.source": "csv"}, "data.path", ""),
        ({"data.source": "parquet"}, "data.path", ""),
        ({"data.source": "sql"}, "data.path", ""),
        ({"data.source": "sql", "data.path": "x.db"}, "data.query", "SELECT"),
        ({"data.path": "x.db"}, "data.query", "SELECT"),
        ({"data.source": "hub"}, "data.name", ""),
        (
            {"data.source": "hub", "data.name": "x", "data.text_column": ""},
            "data.text_column",
            "",
        ),
        ({"data.name": "x", "data.text_column": ""}, "data.text_column", ""),
        ({"data.path": "x.jsonl", "data.text_column": ""}, "data.text_column", ""),
        (
            {"data.source": "csv", "data.path": "x", "data.text_column": ""},
            "data.text_column",
            "",
        ),
        ({"data.name": "x", "data.val_path": "y"}, "data.val_path", "data.path"),
        (
            {"data.path": "x.db", "data.query": "SELECT 1", "data.val_path": "y"},
            "data.val_path",
            "source=sql",
        ),
        (
            {"data.source": "hub", "data.name": "n", "data.path": "x", "data.val_path": "y"},
            "data.val_path",
            "source=hub",
        ),
        (
            {"data.source": "stdlib", "data.path": "x", "data.val_path": "y"},
            "data.val_path",
            "source=stdlib",
        ),
        ({"train.num_steps": 5, "train.num_epochs": 5}, "train.num_steps", "exactly one"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh.fsdp", "one axis"),
    ],
)
def test_fields_that_contradict_each_other(changes, field, expected):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    error = refused(config)
    assert error.field == field
    assert error.got == dict(flat(config))[field]
    assert expected in error.expected


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
        error = refused(values)
        assert (error.field, error.got) == (f"data.{field}", "x")
        assert "data.mixture" in error.expected

    @pytest.mark.parametrize(
        ("part", "field", "got", "expected"),
        [
            (3, "", 3, "weight"),
            ({"path": "a"}, "", {"path": "a"}, "weight"),
            ({"weight": 0.0, "path": "a"}, ".weight", 0.0, "positive"),
            ({"weight": -1, "path": "a"}, ".weight", -1, "positive"),
            ({"weight": math.nan, "path": "a"}, ".weight", math.nan, "finite"),
            ({"weight": math.inf, "path": "a"}, ".weight", math.inf, "finite"),
            ({"weight": True, "path": "a"}, ".weight", True, "type float"),
            ({"weight": "1", "path": "a"}, ".weight", "1", "type float"),
            ({"weight": 1, "path": 3}, ".path", 3, "type str"),
            ({"weight": 1, "path": "a", "join_rows": 1}, ".join_rows", 1, "type bool"),
            ({"weight": 1, "path": "a", "max_bytes": 1.0}, ".max_bytes", 1.0, "type int"),
            ({"weight": 1, "path": "a", "max_bytes": True}, ".max_bytes", True, "type int"),
            ({"weight": 1, "pth": "a"}, ".pth", "a", "weight"),
            ({"weight": 1, "x": "a"}, ".x", "a", "weight"),
            ({"weight": 1, "path": "a", "seq_len": 3}, ".seq_len", 3, "field"),
            ({"weight": 1}, "", "no source", "path"),
            ({"weight": 1, "source": "hub"}, "", "data.name: got ''", ""),
            ({"weight": 1, "source": "web"}, "", "data.source: got 'web'", ""),
        ],
    )
    def test_bad_parts_are_refused_by_name(self, part, field, got, expected):
        error = refused(with_value("data.mixture", {"m": part}))
        assert error.field == f"data.mixture.m{field}"
        assert repr(got)[1:-1] in repr(error.got)
        assert expected in error.expected
        assert "\n" not in str(error)

    @pytest.mark.parametrize(
        ("weights", "named"),
        [((1e308, 1e308), "a"), ((1, 1e308, sys.float_info.max), "c")],
    )
    def test_weights_whose_sum_overflows(self, weights, named):
        parts = {
            name: {"weight": weight, "path": name}
            for name, weight in zip("abc", weights, strict=False)
        }
        error = refused(with_value("data.mixture", parts))
        assert error.field == f"data.mixture.{named}.weight"
        assert error.got == parts[named]["weight"]

    def test_an_unknown_field_of_a_part_is_answered_with_the_nearest_known_one(self):
        error = refused(with_value("data.mixture", {"m": {"weight": 1, "pth": "a"}}))
        assert error.hint == "path"

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
    assert (config.head_width, config.kv_heads) == (64, 8)
    assert dataclasses.replace(config, num_kv_heads=2).kv_heads == 2


def test_a_preset_is_named_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("quickstart", ["train.num_steps=3"])
    assert (config.model.d_model, config.train.num_steps) == (128, 3)


UNUSED = [
    ("text_column=body", "a.txt", "files"),
    ("join_rows=True", "a.txt", "files"),
    ("subset=s", "a.txt", "files"),
    ("name=n", "a.txt", "files"),
    ("query=SELECT 1", "a.jsonl", "json"),
    ("subset=s", "a.csv", "csv"),
    ("encoding_errors=skip", "a.pdf", "pdf"),
    ("text_column=body", "a.pdf", "pdf"),
    ("join_rows=True", "sqlite:///a.db", "sql"),
    ("gitignore=False", "sqlite:///a.db", "sql"),
    ("max_file_bytes=9", "", "hub"),
    ("query=q", "", "hub"),
    ("encoding_errors=replace", "", "stdlib"),
    ("gitignore=False", "", "stdlib"),
]


@pytest.mark.parametrize(("assigned", "path", "source"), UNUSED)
def test_a_field_without_effect_on_the_source_is_refused(assigned, path, source, tmp_path):
    words = [f"data.{assigned}", f"data.path={path}"]
    words += {"hub": ["data.name=n"], "sql": ["data.query='SELECT 1'"]}.get(source, [])
    field = f"data.{assigned.split('=')[0]}"
    for name in ("base", "shakespeare_char"):
        with pytest.raises(InputError) as error:
            load_config(name, words)
        assert error.value.field == field
        assert error.value.expected.endswith(f": it has no effect on data.source={source}")
    default = getattr(Config.from_dict(base.get_config()).data, field.removeprefix("data."))
    same = [word for word in words if not word.startswith(field)] + [f"{field}={default}"]
    load_config("base", same)  # the value that it has anyway


def test_fields_of_another_source_than_the_presets(tmp_path):
    """A preset's own fields may be unused; those of a user's file are meant."""
    for words in (["data.path=a.txt"], ["data.source=stdlib"], ["data.path=a.jsonl"]):
        load_config("wikitext103", words)
    with pytest.raises(InputError, match=r"^data\.subset: .*no effect on data\.source=files"):
        load_config("wikitext103", ["data.path=a.txt", "data.subset=other"])
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n"
        "    c.data.path = 'a.txt'\n    c.data.text_column = 'body'\n    return c\n"
    )
    with pytest.raises(InputError, match=r"^data\.text_column: got 'body'"):
        load_config(str(mine))
    load_config(str(mine), ["data.path=a.csv"])


def test_fields_without_effect_in_a_mixture(tmp_path):
    def load(common, **parts):
        file = tmp_path / "mix.py"
        file.write_text(
            "from configs import base\nfrom ml_collections import ConfigDict\n"
            f"def get_config():\n    c = base.get_config()\n    c.data.update({common!r})\n"
            f"    c.data.mixture = ConfigDict({parts!r})\n    return c\n"
        )
        return load_config(str(file))

    text, rows = {"weight": 1.0, "path": "a.txt"}, {"weight": 1.0, "path": "a.csv"}
    load({"text_column": "body"}, a=text, b=rows)  # of use to one of them
    with pytest.raises(InputError, match=r"^data\.text_column: .*=files"):
        load({"text_column": "body"}, a=text)
    with pytest.raises(InputError, match=r"^data\.mixture\.a\.join_rows: got True; .*=files"):
        load({}, a={**text, "join_rows": True}, b=rows)


@pytest.mark.parametrize(
    ("path", "assigned", "refused"),
    [
        ("rows.jsonl", [], False),  # "auto" reads its rows
        ("rows.jsonl", ["data.source=files"], False),  # the caller's own word
        ("a.txt,rows.csv", [], True),
        ("a.txt,rows.csv.gz", ["data.source=files"], False),
        ("a.txt", [], False),
    ],
)
@pytest.mark.parametrize("preset", ["base", "shakespeare_char"])
def test_a_named_table_is_never_read_as_text_unasked(preset, path, assigned, refused):
    words = [f"data.path={path}", *assigned]
    if not refused:
        load_config(preset, words)
        return
    with pytest.raises(InputError) as error:
        load_config(preset, words)
    assert (error.value.field, error.value.got) == ("data.path", "rows.csv")
    assert "`data.source=files`" in error.value.hint


@pytest.mark.parametrize(
    ("name", "words", "directory"),
    [
        ("quickstart", [], "quickstart"),
        ("configs/quickstart.py", ["train.num_steps=9"], "quickstart"),
        ("quickstart", ["data.path=/x/my_texts/"], "quickstart-my_texts"),
        ("quickstart", ["data.path=play.txt.gz"], "quickstart-play"),
        ("quickstart", ["data.path=a.txt, b/c d.txt"], "quickstart-a-c_d"),
        ("quickstart", ["data.path=texts/*.txt"], "quickstart-texts"),
        ("quickstart", ["data.path=https://me:pw@host/x.parquet?a=b"], "quickstart-x"),
        ("quickstart", ["data.path=https://me:pw@host.org"], "quickstart-host"),
        ("tinystories", ["data.name=./copy/"], "tinystories-copy"),
        ("shakespeare_char", ["data.path=/x/tinyshakespeare.txt"], "shakespeare_char"),
        ("shakespeare_char", ["data.path="], "shakespeare_char-stdlib"),
        ("quickstart", [f"data.path={'x' * 300}"], "quickstart-" + "x" * 40),
    ],
)
def test_the_default_run_directory_is_that_of_the_text(name, words, directory, request):
    named = str(request.config.rootpath / name) if "/" in name else name
    assert default_workdir(named, load_config(named, words)) == Path("runs") / directory


def test_a_run_on_this_text_in_the_plain_directory_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine, other = (load_config("quickstart", [f"data.path={name}"]) for name in "ab")
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/config.json").write_text(json.dumps({"config": mine.to_dict()}))
    assert default_workdir("quickstart", mine) == Path("runs/quickstart")
    assert default_workdir("quickstart", other) == Path("runs/quickstart-b")


def test_a_saved_configuration_is_loaded_with_overrides(tmp_path):
    mixture = {"a": {"weight": 1, "path": "a/"}, "b": {"weight": 3.0, "name": "n"}}
    values = with_value("data.mixture", mixture)
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    assert load_saved_config(tmp_path) == Config.from_dict(values)
    changed = load_saved_config(tmp_path, ["optimizer.b1=0.5", "data.mixture.a.weight=2"])
    assert (changed.optimizer.b1, changed.data.mixture["a"]["weight"]) == (0.5, 2)
    assert changed.optimizer.b2 == values["optimizer"]["b2"]


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("openwebtext", ["data.path=a.txt"]),  # the preset's data.name has no effect then
        ("shakespeare_char", ["data.source=stdlib"]),
        ("quickstart", ["data.source=files", "data.path=notes.csv"]),
        ("quickstart", ["train.sample_prompt=Once", "data.path=a.txt"]),
    ],
)
def test_what_started_a_run_resumes_it(tmp_path, preset, words):
    started = load_config(preset, words)
    saved = started.to_dict()
    for section, fields in ADDED.items():  # as in a run from before these fields
        for field in fields:
            del saved[section][field]
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    assert load_saved_config(tmp_path) == started
    moved = load_saved_config(tmp_path, ["data.path=/new/a.txt", "data.source=files"])
    assert moved.train == started.train


def test_a_secret_that_was_not_saved_is_asked_for(tmp_path):
    url = "https://host/a.txt?token=x"
    saved = load_config("quickstart", [f"data.path={url}"]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    with pytest.raises(InputError) as error:
        load_saved_config(tmp_path)
    assert (error.value.field, error.value.got) == ("data.path", "https://host/a.txt?token=…")
    assert load_saved_config(tmp_path, [f"data.path={url}"]).data.path == url


def test_a_preset_sample_prompt_is_for_its_own_text(tmp_path):
    assert load_config("quickstart").train.sample_prompt
    assert load_config("quickstart", ["data.path=a.txt"]).train.sample_prompt == ""
    mine = tmp_path / "mine.py"
    mine.write_text("from configs.quickstart import get_config\n")
    assert load_config(str(mine), ["data.path=a.txt"]).train.sample_prompt


def test_a_config_file_may_be_anywhere(tmp_path):
    """A colon separates a file from its argument in ml_collections."""
    (tmp_path / "a: b").mkdir()
    path = tmp_path / "a: b" / "mine.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n    return base.get_config()\n"
    )
    assert load_config(str(path), ["seed=3"]).seed == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("preset", sorted({p.stem for p in PRESETS.glob("*.py")} - {"mixture"}))
def test_no_preset_decides_how_a_users_file_is_read(preset):
    assert load_config(preset, ["data.path=rows.jsonl", "data.text_column=x"]).data.source == "auto"


@pytest.mark.parametrize(
    ("assigned", "prompt"),
    [
        ([], "class Reader:"),
        (["train.num_steps=9"], "class Reader:"),
        (["data.path=README.md"], ""),
        (["data.name=owner/name"], ""),
        (["data.path=README.md", "train.sample_prompt=The "], "The "),
    ],
)
def test_the_prompt_of_a_preset_is_for_its_own_text(assigned, prompt):
    assert load_config("quickstart", assigned).train.sample_prompt == prompt
