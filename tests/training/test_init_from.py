"""A run that starts from the parameters of another: what it takes, records, refuses and needs."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from sheepop_jax import pipeline
from sheepop_jax.checkpoint.origin import sha256_of_params
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.config.loading import default_workdir, load_config, load_saved_config
from sheepop_jax.errors import InputError
from sheepop_jax.model.loss import evaluation_sums
from sheepop_jax.model.transformer import init_params
from sheepop_jax.training import loop
from tests.tiny import MACHINE, TEXT, TINY, one_device

pytestmark = pytest.mark.usefixtures("fast_compile")

MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


@pytest.fixture
def source(tiny_root, tmp_path) -> Path:
    """A copy of the tiny run, whose best checkpoint is step 4."""
    return shutil.copytree(tiny_root / "run", tmp_path / "source")


@pytest.fixture
def words(source, tmp_path):
    """`words(*more)`: overrides of `base` for a run of another text that starts from `source`."""
    (tmp_path / "new.txt").write_text(TEXT[::-1])
    fields = {
        **{n: v for n, v in TINY.items() if not n.startswith("model.") and n != "data.tokenizer"},
        "data.path": str(tmp_path / "new.txt"),
        "data.cache_dir": str(tmp_path / "cache"),
        "train.init_from": str(source),
        "train.log_every": 1,
    }

    def make(*more: str) -> list[str]:
        named = {word.partition("=")[0] for word in more}
        return [f"{name}={value}" for name, value in fields.items() if name not in named] + [*more]

    return make


@pytest.fixture
def first_state(words, tmp_path, monkeypatch):
    """`first_state(name, *more)`: the loop of a new run, before its first step."""
    loops = []

    def run(self):
        loops.append(self)
        return {}

    monkeypatch.setattr(loop._Loop, "run", run)

    def make(name: str, *more: str):
        pipeline.train(load_config("base", words(*more)), tmp_path / name, MACHINE)
        return loops[-1]

    return make


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_parameters_are_those_of_the_run_and_the_rest_is_new(source, first_state, tmp_path):
    opened = open_run(source)
    params, step = opened.params()
    assert step == 4
    for name, more in (("one", ["mesh.data=8"]), ("mesh", MESH)):
        made = first_state(name, *more)
        state = made.state
        assert jax.tree.structure(state.params) == jax.tree.structure(params)
        for found, wanted in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
        ):
            assert found.dtype == wanted.dtype
            assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
        assert (int(state.step), int(state.updates), made.step) == (0, 0, 0)
        fresh = made.optimizer.init(params)
        assert jax.tree.structure(state.opt_state) == jax.tree.structure(fresh)
        for found, wanted in zip(
            jax.tree.leaves(state.opt_state), jax.tree.leaves(fresh), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
        assert made.job.config.model == opened.config.model
        split = state.params["embedding"]
        parts = made.job.mesh.shape["fsdp"] * made.job.mesh.shape["tensor"]
        assert split.addressable_shards[0].data.size * parts == split.size


@pytest.mark.parametrize("mesh", [["mesh.data=8"], MESH], ids=("data 8", "2 x 2 x 2"))
def test_the_first_loss_is_that_of_the_runs_parameters(source, words, tmp_path, monkeypatch, mesh):
    config = load_config("base", words("train.num_steps=1", "model.dropout=0.0", *mesh))
    jobs, fit = [], pipeline.fit
    monkeypatch.setattr(pipeline, "fit", lambda job, stop: jobs.append(job) or fit(job, stop))
    stub = dict.fromkeys(("val_loss", "val_perplexity", "val_accuracy"), 1.0)
    monkeypatch.setattr(pipeline.Evaluator, "validate", lambda *_: stub)
    pipeline.train(config, tmp_path / "new", MACHINE)
    params, _ = open_run(source).params()
    model = open_run(source).model()
    inputs, targets, weights = (np.asarray(x)[0] for x in jobs[0].batches.batch_at(0)[:3])

    @jax.jit  # on one device
    def loss_of(params):
        hidden, _ = model.apply({"params": params}, inputs)
        sums = evaluation_sums(
            hidden, params["embedding"], targets, weights, model.vocab_size, 0.0, weights.size
        )
        return sums[0] / sums[2]

    found = lines_of(tmp_path / "new")[0]["loss"]
    np.testing.assert_allclose(found, loss_of(params), rtol=1e-6)
    assert abs(found - loss_of(init_params(model, config.seed))) > 1e-3


def test_where_the_parameters_came_from_is_recorded(source, first_state, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    before = (source / "config.json").read_text()
    first_state("new", *MESH)
    params, _ = open_run(source).params()
    digest = hashlib.sha256()

    def add(prefix: str, tree: dict) -> None:
        for name in sorted(tree):
            if isinstance(tree[name], dict):
                add(f"{prefix}{name}.", tree[name])
            else:
                array = np.asarray(tree[name])
                digest.update(f"{prefix}{name} float32{[*array.shape]}\n".encode())
                digest.update(array.tobytes(order="C"))

    add("", params)
    origin = {"path": str(source), "step": 4, "sha256": digest.hexdigest()}
    saved = json.loads((tmp_path / "new/config.json").read_text())
    assert saved["init_from"] == origin
    assert saved["config"]["train"]["init_from"] == str(source)
    assert f"parameters: step 4 of {source}, SHA-256 {origin['sha256']}" in caplog.messages
    assert (source / "config.json").read_text() == before
    tokenizers = [(run / "tokenizer.json").read_bytes() for run in (source, tmp_path / "new")]
    assert tokenizers[0] == tokenizers[1]


def test_the_hash_depends_on_names_shapes_dtypes_and_bytes():
    base = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].view(np.int32), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
        {"a": base["a"], "b": np.zeros((2, 1), np.float32)},
    ]
    digests = {sha256_of_params(tree) for tree in (base, *others)}
    assert len(digests) == 6
    column_major = {**base, "a": np.asfortranarray(base["a"])}
    assert sha256_of_params(column_major) == sha256_of_params(base)
    assert sha256_of_params({"b": base["b"], "a": base["a"]}) == sha256_of_params(base)


@pytest.mark.parametrize(
    ("word", "field", "expected"),
    [
        ("model.d_model=48", "model.d_model", "24, as in"),
        ("model.position=learned", "model.position", "'rope', as in"),
        ("model.rope_theta=20000", "model.rope_theta", "10000.0, as in"),
        ("model.use_bias=True", "model.use_bias", "False, as in"),
        ("data.seq_len=33", "data.seq_len", "at most 32"),
        ("data.tokenizer=bpe", "data.tokenizer", "'char', as in"),
    ],
)
def test_a_contradiction_is_refused_by_field(words, word, field, expected):
    with pytest.raises(InputError) as error:
        load_config("base", words(word))
    assert (error.value.field, str(error.value.got)) == (field, load_value(word))
    assert expected in error.value.expected
    if field == "data.seq_len":
        assert error.value.hint == "`data.seq_len=32`"


def load_value(word: str) -> str:
    value = word.partition("=")[2]
    return "20000.0" if value == "20000" else value


def test_what_does_not_contradict_is_taken(source, words):
    model = open_run(source).config.model
    assert load_config("base", words()).model == model
    assert load_config("base", words("model.d_model=24", "data.tokenizer=char")).model == model
    free = {"dropout": 0.3, "attention_dropout": 0.2, "remat": "full", "max_seq_len": 64}
    config = load_config("base", words(*(f"model.{n}={v}" for n, v in free.items())))
    assert config.model == replace(model, **free)
    assert config.data.tokenizer == str(source / "tokenizer.json")
    # The model section of a file is replaced, and its context with it.
    assert load_config("gpt2_124m", words()).model == model


def test_a_run_is_the_same_by_any_path(source, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = load_config("base", words("train.init_from=source"), tmp_path / "new")
    assert started.train.init_from == "source"
    (tmp_path / "new").mkdir()
    saved = {"schema": 2, "config": started.to_dict()}
    (tmp_path / "new/config.json").write_text(json.dumps(saved))
    for same in ("source/", f"{source}", "./source"):
        again = load_config("base", words(f"train.init_from={same}"), tmp_path / "new")
        assert again == started


def test_the_vocabulary_is_that_of_the_run(source, words):
    with pytest.raises(InputError) as error:
        load_config("base", words("data.vocab_size=4000"))
    assert error.value.field == "data.vocab_size"
    path = source / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"imported": {"directory": "x"}}))
    kind = saved["config"]["data"]["tokenizer"]  # of the configuration that an import writes
    for word in (f"data.tokenizer={kind}", "data.vocab_size=50257"):
        with pytest.raises(InputError) as error:
            load_config("base", words(word))
        assert error.value.field == word.partition("=")[0]


def test_learned_positions_fix_the_context(source, words):
    saved = json.loads((source / "config.json").read_text())
    saved["config"]["model"]["position"] = "learned"
    (source / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError) as error:
        load_config("base", words("model.max_seq_len=64"))
    assert (error.value.field, error.value.got) == ("model.max_seq_len", 64)


def test_another_tokenizer_file_is_refused(source, words, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "prepare", None)
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"]["Z"] = len(content["model"]["vocab"])
    (tmp_path / "other.json").write_text(json.dumps(content))
    config = load_config("base", words(f"data.tokenizer={tmp_path}/other.json"))
    with pytest.raises(InputError) as error:
        pipeline.train(config, tmp_path / "new", MACHINE)
    assert (error.value.field, error.value.got) == ("data.tokenizer", f"{tmp_path}/other.json")
    assert not (tmp_path / "new").exists()


def test_another_model_is_refused_where_no_flags_were_resolved(words, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "prepare", None)
    config = load_config("base", words())
    config = replace(config, model=replace(config.model, d_ff=64))
    with pytest.raises(InputError) as error:
        pipeline.train(config, tmp_path / "new", MACHINE)
    assert (error.value.field, error.value.got) == ("model.d_ff", 64)


def no_checkpoint(source: Path) -> str:
    shutil.rmtree(source / "checkpoints")
    return str(source / "checkpoints")


def damaged(source: Path) -> str:
    (found,) = (source / "checkpoints/00000004/params").glob("manifest.ocdbt")
    found.write_bytes(b"x" + found.read_bytes()[1:])
    return "train.init_from"


def other_vocabulary(source: Path) -> str:
    saved = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**saved, "vocab_size": 3}))
    return str(source / "tokenizer.json")


def other_arrays(source: Path) -> str:
    saved = json.loads((source / "config.json").read_text())
    saved["config"]["model"]["d_ff"] = 48
    (source / "config.json").write_text(json.dumps(saved))
    return str(source / "checkpoints/00000004/params")


def missing(source: Path) -> str:
    shutil.rmtree(source)
    return "train.init_from"


def no_config(source: Path) -> str:
    (source / "config.json").write_text("{}")
    return str(source / "config.json")


@pytest.mark.parametrize(
    "damage", [missing, no_config, no_checkpoint, damaged, other_vocabulary, other_arrays]
)
def test_a_run_that_cannot_be_used_is_one_line_before_any_text_is_read(
    source, words, tmp_path, monkeypatch, damage
):
    monkeypatch.setattr(pipeline, "prepare", None)
    field = damage(source)
    with pytest.raises(InputError) as error:
        pipeline.train(load_config("base", words()), tmp_path / "new", MACHINE)
    assert error.value.field == field and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_resumed_run_does_not_need_the_other(source, words, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    new, model = tmp_path / "new", open_run(source).config.model
    with one_device():
        pipeline.train(load_config("base", words("train.num_steps=2")), new, MACHINE)
        record = json.loads((new / "config.json").read_text())
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "cache")  # the text is encoded again
        caplog.clear()
        same = load_config("base", words("train.num_steps=3"), new)
        assert same.model == model
        assert load_saved_config(new, ["train.num_steps=3"]) == same
        pipeline.train(same, new, MACHINE)
    assert "resuming from step 2" in caplog.messages
    after = json.loads((new / "config.json").read_text())
    assert after["init_from"] == record["init_from"] and after["data"] == record["data"]
    assert [line["step"] for line in lines_of(new) if "loss" in line] == [1, 2, 3]
    shutil.rmtree(tmp_path / "cache")
    assert len(open_run(new).prepared_data().validation)


def test_a_run_without_a_checkpoint_of_its_own_starts_from_the_other_again(
    source, words, first_state, tmp_path
):
    first_state("new", *MESH)
    first_state("new", *MESH)
    shutil.rmtree(source / "checkpoints/00000004")
    assert int(first_state("new", *MESH).state.step) == 0
    assert json.loads((tmp_path / "new/config.json").read_text())["init_from"]["step"] == 2


def test_the_directory_is_named_after_both(source, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config("base", words())
    assert default_workdir("base", config) == Path("runs/base-from-source-new")
    assert load_config("base", words("data.path=")).train.init_from == str(source)


def test_another_tokenizer_is_not_suggested_for_a_character_that_it_lacks(words, tmp_path):
    (tmp_path / "new.txt").write_text(TEXT + "Z")
    with pytest.raises(InputError) as error:
        pipeline.train(load_config("base", words()), tmp_path / "new", MACHINE)
    assert "'Z'" in error.value.got and "tokenizer" not in error.value.hint
