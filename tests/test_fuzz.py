"""Random configurations: each is refused by the name of a field, or good for a train step.

Every run draws other examples. The seed is printed with a failure; SHEEPOP_JAX_FUZZ_SEED=N repeats
the draw. The tests marked `slow` draw many more.
"""

import math
import os
import random
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

import train
from configs import base
from sheepop_jax import pipeline
from sheepop_jax.config.loading import load_config
from sheepop_jax.config.schema import Config
from sheepop_jax.data.batch import Batch
from sheepop_jax.errors import InputError
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.runtime import platform
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.step import init_state, make_train_step
from tests.test_config import flat

# Small, and with room for a change of one field to be good.
SMALL = {
    "model.d_model": 48,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.d_ff": 40,
    "model.max_seq_len": 64,
    "data.vocab_size": 300,
    "data.seq_len": 16,
    "train.batch_size": 4,
    "train.grad_accum_steps": 2,
}
FIELDS = flat(base.get_config())
CHOICES = {
    "model.activation": ["gelu", "gelu_tanh", "relu", "relu2", "silu"],
    "model.feed_forward": ["mlp", "gated"],
    "model.norm": ["layernorm", "rmsnorm"],
    "model.position": ["rope", "sinusoidal", "learned"],
    "model.rope_scaling": ["none", "linear", "llama3"],
    "model.remat": ["none", "dots", "full"],
    "optimizer.name": ["adamw", "muon"],
    "optimizer.schedule": ["cosine", "linear", "constant"],
    "data.packing": ["stream", "one_per_window", "whole"],
    "data.format": ["text", "chat"],
    "data.broken_rows": ["error", "skip"],
    "data.chat_template": ["", "sheepop", "chatml", "llama3", "qwen"],
    "data.chat_loss": ["assistant", "all"],
    "data.long_conversations": ["drop", "truncate"],
    "data.encoding_errors": ["strict", "replace", "skip"],
    "data.source": ["auto", "stdlib", "files", "json"],
    "data.val_split": ["auto", "document", "tail", "tails"],
    "train.platform": ["auto", "cpu", "cuda", "tpu"],
    "train.trackers": ["", "tensorboard", "wandb", "tensorboard,wandb"],
    "train.dtype": ["auto", "float32", "bfloat16"],
}
# What is only traced would still cost the compiler or this test its time: one block each.
COSTLY = {"model.num_layers": 3}

INTS = st.one_of(
    st.integers(0, 64),
    st.sampled_from([1, 2, 4, 8, 12, 24, 48]),
    st.sampled_from([1, 2, 4, 12]),
    st.sampled_from([-1, 0, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(10**30)]),
)
FLOATS = st.one_of(
    st.floats(1e-6, 0.99),
    st.floats(0, 1),
    st.sampled_from([-1.0, -0.0, 0.0, 1.0, 1e-45, 1e-300, 1e300, math.inf, -math.inf, math.nan]),
)
# Where the range of INTS or FLOATS has few good values.
SCALES: dict[str, list[Any]] = {
    "model.partial_rotary": [0.25, 0.5, 1.0],
    "model.rope_scaling_factor": [1.0, 2.5, 8.0],
    "model.rope_high_freq_factor": [1.5, 4.0],
    "data.vocab_size": [257, 300, 5000],
    # Above 0 only together, with a run.
    "train.lora_rank": [0],
    "train.lora_alpha": [0.0],
    "train.lora_dropout": [0.0],
}
STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.just("nan"), st.just(""), st.just(True), st.just(1.5), st.just(7), st.just([1]),
    st.just({}), st.just({"a": 1}), st.just(10**400), st.text(max_size=4),
)  # fmt: skip  # a list of values


def values(name: str) -> st.SearchStrategy[Any]:
    """Mostly of the field's type: in range, at an edge, beyond it; now and then of another."""
    match FIELDS[name]:
        case bool():
            good: st.SearchStrategy[Any] = st.booleans()
        case int():
            top = COSTLY.get(name)
            good = st.integers(-1, top) if top else INTS
            good = good | st.sampled_from(SCALES[name]) if name in SCALES else good
        case float():
            good = FLOATS | st.sampled_from(SCALES[name]) if name in SCALES else FLOATS
        case str():
            named = st.sampled_from(CHOICES.get(name, ["", "auto", "char"]))
            good = st.one_of(named, named, named, st.text(max_size=5))
        case _:
            good = st.just({})
    return st.integers(0, 9).flatmap(lambda roll: STRANGE if roll == 0 else good)


CHANGES = st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values(name) for name in names})
)
SEED = int(os.environ.get("SHEEPOP_JAX_FUZZ_SEED") or random.randrange(2**32))
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FEW = settings(max_examples=6, database=None, deadline=None, suppress_health_check=HEALTH)
MANY = settings(FEW, max_examples=500)


@pytest.fixture(autouse=True)
def print_seed() -> None:
    """pytest shows it with the report of a test that fails."""
    print(f"SHEEPOP_JAX_FUZZ_SEED={SEED}")


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    tree = base.get_config().to_dict()
    for name, value in (SMALL | changes).items():
        *sections, field = name.split(".")
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[field] = value
    return tree


def names_a_field(message: str) -> bool:
    named = re.match(r"(--config\.)?([\w.]+): got .+; expected .+", message)
    return (
        named is not None
        and "\n" not in message
        and (named[2] in FIELDS or named[2].startswith("data.mixture."))
    )


def trace_a_step(config: Config) -> None:
    """As test_configs.py does for the shipped ones."""
    model = Transformer(config.model, 300)
    schedule = make_schedule(config.optimizer, config.train.num_steps or 10)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_train_step(model, optimizer, schedule, config.seed)
    shape = (config.train.grad_accum_steps, config.train.batch_size, config.data.seq_len)
    ints, floats = (jax.ShapeDtypeStruct(shape, kind) for kind in (np.int32, np.float32))
    batch = Batch(ints, ints, floats, ints if config.data.document_mask else None)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
    after, metrics = jax.eval_shape(step, state, batch)
    assert after == state
    assert metrics.loss.shape == ()


def in_reach(config: Config) -> bool:
    """Whether tracing it takes no more than its time: no array beyond what int32 can index."""
    model, train = config.model, config.train
    widest = max(model.d_model, model.d_ff, model.max_seq_len, train.batch_size)
    return widest <= 2**12 and train.grad_accum_steps <= 2**12


def check_configuration(changes: dict[str, Any]) -> None:
    try:
        config = Config.from_dict(changed(changes))
    except InputError as error:
        assert names_a_field(str(error)), str(error)
        return
    assert Config.from_dict(config.to_dict()) == config
    if in_reach(config):
        trace_a_step(config)


@seed(SEED)
@FEW
@example({"train.num_steps": 2**31 - 1})
@example({"optimizer.warmup_steps": 2**31 - 1})
@example({"model.dropout": 10**400})
@example({"optimizer.learning_rate": 3e38, "optimizer.eps": 1.2e-38})
@example({"optimizer.weight_decay": 1e300})
@example({"model.num_layers": 2, "model.num_kv_heads": 1, "model.position": "learned"})
@given(CHANGES)
def test_a_configuration_trains_or_is_refused_by_name(changes: dict[str, Any]) -> None:
    check_configuration(changes)


@pytest.mark.slow
@seed(SEED)
@MANY
@given(CHANGES)
def test_many_configurations(changes: dict[str, Any]) -> None:
    check_configuration(changes)


TYPED = st.lists(
    st.sampled_from(sorted(set(FIELDS) - {"data.mixture"})), min_size=1, max_size=3, unique=True
).flatmap(
    lambda names: st.tuples(
        *(values(name).map(lambda value, name=name: f"--config.{name}={value}") for name in names)
    )
)
UNKNOWN = st.text("adelmo_.\n", max_size=9).map(lambda name: f"--config.{name}=3")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What train.py would have trained, in a process whose signals and flags stay as they are."""
    trained: list[Config] = []

    def note(config: Config, *rest: Any) -> dict[str, float]:
        trained.append(config)
        return {}

    monkeypatch.setattr(pipeline, "train", note)
    monkeypatch.setattr(platform, "prepare", lambda *asked: None)
    monkeypatch.setattr("sheepop_jax.training.signals.StopSignal.install", lambda self: self)
    return trained


def check_command_line(
    trained: list[Config],
    capsys: pytest.CaptureFixture[str],
    typed: tuple[str, ...],
    unknown: list[str],
) -> None:
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    trained.clear()
    capsys.readouterr()
    try:
        code = train.main(["--config", "configs/base.py", *small, *typed, *unknown])
    except SystemExit as left:
        out, err = capsys.readouterr()
        assert (left.code, out, err.count("\n")) == (2, "", 1), err
        message = err.removeprefix("error: ").strip()
        assert unknown or names_a_field(message), err
        assert message != err
        return
    [config] = trained
    assert (code, unknown) == (0, [])
    assignments = [word.removeprefix("--config.") for word in (*small, *typed)]
    assert load_config("configs/base.py", assignments) == config


@seed(SEED)
@settings(FEW, max_examples=20)
@given(TYPED, st.lists(UNKNOWN, max_size=1))
def test_a_command_line_is_taken_or_refused_by_name(
    no_training: list[Config],
    capsys: pytest.CaptureFixture[str],
    typed: tuple[str, ...],
    unknown: list[str],
) -> None:
    check_command_line(no_training, capsys, typed, unknown)


@pytest.mark.slow
@seed(SEED)
@MANY
@given(TYPED, st.lists(UNKNOWN, max_size=1))
def test_many_command_lines(
    no_training: list[Config],
    capsys: pytest.CaptureFixture[str],
    typed: tuple[str, ...],
    unknown: list[str],
) -> None:
    check_command_line(no_training, capsys, typed, unknown)


def test_the_draws_are_of_both_kinds() -> None:
    """Many that are good, and many that are refused. The same draws in every run."""
    good: list[bool] = []

    @settings(FEW, max_examples=80, derandomize=True)
    @given(CHANGES)
    def count(changes: dict[str, Any]) -> None:
        try:
            Config.from_dict(changed(changes))
        except InputError:
            good.append(False)
        else:
            good.append(True)

    count()
    assert 0.2 < sum(good) / len(good) < 0.8
