"""Adapters: what they compute, train, save, need and refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sheepop_jax import pipeline
from sheepop_jax.checkpoint.frozen import adapters_of
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.cli.main import main
from sheepop_jax.config.loading import load_config
from sheepop_jax.config.schema import LoraConfig
from sheepop_jax.data.batch import Batch
from sheepop_jax.errors import InputError
from sheepop_jax.model.linear import Adapted, dot_general
from sheepop_jax.model.lora import adapted, init_trained, merged, trained_shapes
from sheepop_jax.model.partitioning import make_mesh, state_shardings
from sheepop_jax.model.transformer import Transformer, boxed_shapes
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import init_state, jit_step, make_train_step
from tests.tiny import MACHINE, TEXT, TINY, one_device

LORA = LoraConfig(rank=3, alpha=7.5, dropout=0.0)
DROPPING = replace(LORA, dropout=0.4)
LAYERS = (
    ("attention", ("query", "key", "value", "output")),
    ("feed_forward", ("gate", "up", "down")),
)

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def small(make_config, random_params) -> Any:
    """A model with all seven layers, its parameters, adapters that are not zero, and tokens."""
    fields = {"num_layers": 1, "feed_forward": "gated", "num_kv_heads": 2, "d_ff": 78}
    config = make_config({f"model.{name}": value for name, value in fields.items()})
    model = Transformer(config.model, 50, lora=LORA)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32)

    params = random_params(model)
    adapters = jax.tree.map(draw, jax.eval_shape(lambda: init_trained(model, 0)))
    tokens = rng.integers(0, 50, (4, 2, 14)).astype(np.int32)
    rows = [np.ascontiguousarray(part) for part in (tokens[..., :-1], tokens[..., 1:])]
    batch = Batch(*rows, np.ones(rows[0].shape, np.float32), None)
    return SimpleNamespace(
        config=config, model=model, params=params, adapters=adapters, batch=batch
    )


@pytest.fixture(scope="module")
def hidden(small) -> Any:
    return jax.jit(lambda p: small.model.apply({"params": p}, small.batch.inputs[0])[0])


def bytes_of(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_every_linear_layer_is_adapted_and_nothing_else(small):
    for part, layers in LAYERS:
        assert {*small.adapters["block_0"][part]} == {*layers}
    assert {*small.adapters} == {"block_0"}
    found = small.adapters["block_0"]["feed_forward"]["down"]
    assert (found["lora_A"].shape, found["lora_B"].shape) == ((78, 3), (3, 60))


def test_a_new_adapter_leaves_the_model_as_it_is_bit_for_bit(small, hidden):
    fresh = jax.jit(lambda: init_trained(small.model, 5))()
    a = fresh["block_0"]["attention"]["query"]["lora_A"]
    assert abs(float(a.std()) * np.sqrt(60) - 1) < 0.2
    assert bytes_of(a) != bytes_of(fresh["block_0"]["attention"]["key"]["lora_A"])
    np.testing.assert_array_equal(hidden(adapted(small.params, fresh, LORA)), hidden(small.params))


def test_merged_is_unmerged(small, hidden):
    before, apart = hidden(small.params), hidden(adapted(small.params, small.adapters, LORA))
    whole = hidden(merged(small.params, small.adapters, LORA))
    assert jnp.abs(apart - before).max() > 0.5
    # Of a sum of some 60 terms of size 1: rounding.
    assert jnp.abs(apart - whole).max() < 1e-5 * jnp.abs(whole).max()


def test_one_layer_is_the_formula():
    rng = np.random.default_rng(0)
    x, w, a, b = (
        rng.standard_normal(s).astype(np.float32) for s in ((6, 9), (9, 7), (9, 2), (2, 7))
    )
    layer = Adapted(w, a, b, None, 2.5, 0.0)
    found = dot_general(jnp.asarray(x), layer, (((1,), (0,)), ((), ())))
    x, w, a, b = (array.astype(np.float64) for array in (x, w, a, b))
    np.testing.assert_allclose(found, x @ (w + 2.5 * a @ b), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        merged({"kernel": w.astype(np.float32)}, {"lora_A": a, "lora_B": b}, LORA)["kernel"],
        w + 2.5 * a @ b,
        rtol=1e-6,
        atol=1e-6,
    )


def test_gradients_are_those_of_the_whole_matrix_projected(small):
    """With W' = W + s A B and G = dL/dW': dL/dA = s G Bᵀ and dL/dB = s Aᵀ G."""

    def loss(params):
        hidden, _ = small.model.apply({"params": params}, small.batch.inputs[0])
        return jnp.sum(jnp.sin(hidden))

    of_adapters = jax.jit(jax.grad(lambda ad: loss(adapted(small.params, ad, LORA))))
    found = of_adapters(small.adapters)
    whole = jax.jit(jax.grad(loss))(merged(small.params, small.adapters, LORA))
    for part, layers in LAYERS:
        for layer in layers:
            gradient = np.asarray(whole["block_0"][part][layer]["kernel"], np.float64)
            factors = small.adapters["block_0"][part][layer]
            a, b = (np.asarray(factors[name], np.float64) for name in ("lora_A", "lora_B"))
            made = found["block_0"][part][layer]
            for name, expected in (
                ("lora_A", 2.5 * gradient @ b.T),
                ("lora_B", 2.5 * a.T @ gradient),
            ):
                np.testing.assert_allclose(made[name], expected, atol=2e-5 * np.abs(expected).max())


def stepped(small, mesh: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """The state after one step with dropout, its metrics, and the frozen parameters."""
    schedule = make_schedule(small.config.optimizer, 7)
    optimizer = make_optimizer(small.config.optimizer, schedule)
    model = small.model.clone(lora=DROPPING)
    state = init_state(model, optimizer, 3)
    state = replace(state, params=jax.tree.map(jnp.copy, small.adapters))
    shardings = state_shardings(trained_shapes(model), state, mesh)
    boxed = boxed_shapes(model)
    step = make_train_step(model, optimizer, schedule, seed=3)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, shardings)
        frozen = jax.device_put(small.params, state_shardings(boxed, small.params, mesh))
        state, metrics = jit_step(step, shardings, mesh, "none")(state, batch, frozen)
    return state, metrics, frozen


@pytest.fixture(scope="module")
def alone(small) -> Any:
    return stepped(small, make_mesh(small.config.mesh, jax.devices()[:1]), small.batch)


def test_a_step_changes_the_adapters_alone(small, alone, hidden):
    state, metrics, frozen = alone
    assert bytes_of(frozen) == bytes_of(small.params) and not bool(metrics.skipped)
    for new, old in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(small.adapters), strict=True
    ):
        assert (new != old).any() and new.shape == old.shape
    count = sum(leaf.size for leaf in jax.tree.leaves(small.adapters))
    norms = 128 + 3  # and the counters of updates
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * count + norms


def test_an_update_does_not_depend_on_mesh_or_microbatches(small, alone):
    one_microbatch = Batch(*(None if x is None else x.reshape(1, 8, 13) for x in small.batch))
    mesh = make_mesh(replace(small.config.mesh, data=2, fsdp=2, tensor=2), jax.devices())
    state, metrics, _ = stepped(small, mesh, one_microbatch)
    np.testing.assert_allclose(metrics.loss, alone[1].loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, alone[1].grad_norm, rtol=1e-4)
    for found, expected in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(alone[0].opt_state), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    block = state.params["block_0"]
    query, down = block["attention"]["query"], block["feed_forward"]["down"]
    for layer, a, b in ((query, "fsdp", "tensor"), (down, "tensor", "fsdp")):
        assert tuple(layer["lora_A"].sharding.spec) in ((a,), (a, None))
        assert tuple(layer["lora_B"].sharding.spec) == (None, b)


def test_dropout_is_of_the_inputs_of_a_and_keeps_their_mean():
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 7), (9, 2), (2, 7)))
    keys = jax.random.split(jax.random.key(0), 4000)
    x = jnp.ones((8000, 9))  # two tokens in each row
    layer = Adapted(*map(jnp.asarray, (w, a, b)), keys, 2.5, 0.25)
    found = layer.low_rank(x).reshape(4000, 2, 7)
    whole = 2.5 * np.ones(9) @ a @ b
    assert np.abs(found.mean((0, 1)) - whole).max() < 0.05 * np.abs(whole).max() + 0.1
    assert (found[:, 0] != found[:, 1]).any(-1).mean() > 0.9
    again = replace(layer, keys_B=keys[:2]).low_rank(x[:4]).reshape(2, 2, 7)
    np.testing.assert_allclose(again, found[:2], rtol=1e-5)


@pytest.fixture(scope="module")
def words(tiny_root, tmp_path_factory) -> Any:
    """`words(base, *more)`: overrides of `base.py` for adapters of the run `base`."""
    root = tmp_path_factory.mktemp("lora")
    (root / "new.txt").write_text(TEXT[::-1])
    fields = {
        **{n: v for n, v in TINY.items() if not n.startswith("model.") and n != "data.tokenizer"},
        "data.path": str(root / "new.txt"),
        "data.cache_dir": str(root / "cache"),
        "train.lora_rank": 4,
        "train.lora_alpha": 8.0,
        "train.lora_dropout": 0.25,
        "optimizer.learning_rate": 0.01,
    }

    def make(source: Path, *more: str) -> list[str]:
        given = {**fields, "train.init_from": str(source)}
        named = {word.partition("=")[0] for word in more}
        return [f"{name}={value}" for name, value in given.items() if name not in named] + [*more]

    return make


def train(words: list[str], directory: Path) -> None:
    with one_device():
        pipeline.train(load_config("base", words, directory), directory, MACHINE)


@pytest.fixture(scope="module")
def trained(tiny_root, words, tmp_path_factory) -> Path:
    """A folder with a run `base` and a run `lora` of its adapters, trained without a pause."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_root / "run", root / "base")
    train(words(root / "base"), root / "lora")
    return root


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of `trained`; its `lora` still adapts the base of `trained`."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_resumed_in_the_middle_is_the_same_bit_for_bit(trained, words, tmp_path):
    half = shutil.copytree(trained / "lora", tmp_path / "half")
    shutil.rmtree(half / "checkpoints/00000004")
    train(words(trained / "base"), half)
    ours, theirs = (adapters_of(open_run(run), 4)[0] for run in (half, trained / "lora"))
    assert bytes_of(ours) == bytes_of(theirs)
    two = adapters_of(open_run(half), 2)[0]
    assert bytes_of(two) != bytes_of(ours)


def test_a_checkpoint_holds_adapters_and_the_run_is_the_merged_model(trained):
    run, base = open_run(trained / "lora"), open_run(trained / "base")
    adapters, step = adapters_of(run, "latest")
    params, found = run.params("latest")
    assert step == found == 4
    frozen, _ = base.params()
    expected = merged(frozen, adapters, LoraConfig(4, 8.0, 0.25))
    assert jax.tree.structure(params) == jax.tree.structure(frozen)
    assert bytes_of(params) == bytes_of(expected) != bytes_of(frozen)
    assert bytes_of(params["embedding"]) == bytes_of(frozen["embedding"])
    saved = trained / "lora/checkpoints/00000004/params"
    assert (
        "lora_A" in str(sorted(saved.iterdir())) or b"lora_A" in (saved / "_METADATA").read_bytes()
    )
    assert b"embedding" not in (saved / "_METADATA").read_bytes()
    record = json.loads((trained / "lora/config.json").read_text())["init_from"]
    assert record["path"] == str(trained / "base") and record["step"] == 4


def missing(base: Path) -> str:
    shutil.rmtree(base)
    return "no directory"


def step_missing(base: Path) -> str:
    shutil.rmtree(base / "checkpoints/00000004")
    return "no step 4"


def damaged(base: Path) -> str:
    next((base / "checkpoints/00000004/params").rglob("d/*")).write_bytes(b"x")
    return "a damaged step 4"


def changed(base: Path) -> str:
    params, _ = open_run(base).params(4)
    one = jax.tree.map(lambda x: x, params)
    one["embedding"] = one["embedding"].at[0, 0].add(1.0)
    saver = CheckpointSaver(base / "checkpoints")
    saver.save(TrainState(jnp.int32(4), jnp.int32(4), one, {}), {"val_loss": 0.0})
    saver.wait()
    return "parameters of SHA-256"


@pytest.mark.parametrize("damage", [missing, step_missing, damaged, changed])
def test_another_base_is_refused_in_one_line(copied, words, damage):
    base, lora = copied / "base", copied / "lora"
    path = lora / "config.json"
    saved = json.loads(path.read_text())
    saved["init_from"]["path"] = saved["config"]["train"]["init_from"] = str(base)
    path.write_text(json.dumps(saved))
    assert open_run(lora).params()[1]
    got = damage(base)
    more = ("train.num_steps=5",)
    for use in (
        lambda: open_run(lora).params(),
        lambda: train(words(base, *more), lora),
    ):
        with pytest.raises(InputError) as error:
            use()
        assert error.value.field == str(base) and str(error.value.got).startswith(got)
        assert f"which {lora} adapts" in error.value.expected
        assert "putting that run back" in error.value.hint and "\n" not in str(error.value)
    assert sorted(p.name for p in (lora / "checkpoints").iterdir()) == ["00000002", "00000004"]


def test_a_run_of_adapters_is_no_base(trained, words, tmp_path):
    with pytest.raises(InputError) as error:
        train(words(trained / "lora"), tmp_path / "new")
    assert error.value.field == "train.init_from" and "--format hf" in error.value.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("train.lora_rank=25", "at most 24"),
        ("train.lora_rank=0", "train.lora_rank above 0"),
        ("optimizer.name=muon", "adamw where train.lora_rank"),
        ("train.lora_dropout=1.0", "[0, 1)"),
    ],
)
def test_what_cannot_be_trained_is_refused(trained, words, word, rule):
    with pytest.raises(InputError) as error:
        load_config("base", words(trained / "base", word))
    assert rule in error.value.expected


@pytest.mark.parametrize("field", ["lora_rank", "lora_alpha"])
def test_a_resumed_run_keeps_rank_and_alpha(trained, words, field):
    with pytest.raises(InputError) as error:
        train(words(trained / "base", f"train.{field}=2"), trained / "lora")
    assert f"train.{field}" in str(error.value.got)


def test_the_commands_take_a_run_of_adapters(trained, tmp_path, capsys):
    def run(*flags: str) -> int:
        try:
            return main([*flags])
        except SystemExit as error:
            assert isinstance(error.code, int)
            return error.code

    lora, base = str(trained / "lora"), str(trained / "base")
    assert run("export", "--ckpt", lora, "--format", "hf", "--out", str(tmp_path / "hf")) == 0
    assert run("export", "--ckpt", lora, "--format", "peft", "--out", str(tmp_path / "peft")) == 0
    assert "of rank 4, alpha 8; merged" in (tmp_path / "hf/README.md").read_text()
    shown = capsys.readouterr()
    assert f"of step 4 of {base}" in shown.err
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "peft").iterdir()} == names
    assert run("export", "--ckpt", base, "--format", "peft", "--out", str(tmp_path / "no")) == 2
    assert "train.lora_rank" in capsys.readouterr().err
