"""What must be settled before the first test imports jax, and the fixtures that the tests share."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import base
from sheepop_jax.config.schema import Config
from sheepop_jax.runtime.xla_flags import xla_flags

# None of these imports brings jax. Flags stand before the user's own, so that the user's win.
_OUTSIDE = dict(os.environ)
_FLAGS = " ".join([*xla_flags(version("jaxlib")), "--xla_force_host_platform_device_count=8"])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

# No two dimensions are equal (C = 10), so that an axis in the wrong place cannot go unnoticed.
SMALL: dict[str, Any] = {
    "model.d_model": 60,
    "model.num_layers": 2,
    "model.num_heads": 6,
    "model.num_kv_heads": 3,
    "model.d_ff": 79,
    "model.max_seq_len": 29,
    "data.vocab_size": 307,
    "data.seq_len": 13,
    "optimizer.warmup_steps": 2,
    "train.platform": "cpu",
    "train.num_steps": 7,
    "train.batch_size": 5,
    "train.grad_accum_steps": 2,
    "train.dtype": "float32",
}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """`make_config({"model.use_bias": True, …})`: base.py, made small, then changed as given."""

    def make(overrides: Mapping[str, Any] | None = None) -> Config:
        config = base.get_config()
        config.update_from_flattened_dict({**SMALL, **(overrides or {})})
        return Config.from_dict(config)

    return make


@pytest.fixture
def process_env() -> dict[str, str]:
    """The environment for a program that a test starts: one CPU device, flags as the user's."""
    return _OUTSIDE | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture
def small_config(make_config: Callable[..., Config]) -> Config:
    """The small configuration as it is."""
    return make_config()


def draw_params(model: Any, seed: int = 0) -> Any:
    """Parameters of which none is at 0 or 1, as init leaves some.

    Biases and the norms' γ and β are random too, and the linear layers are wide enough for every
    part of the model to show in its output.
    """
    import jax
    from flax import linen as nn

    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
    generator = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        x = generator.standard_normal(leaf.shape)
        match path[-1].key:
            case "kernel":
                x = x / np.sqrt(leaf.shape[0])
            case "scale":
                x = 1 + 0.3 * x
            case "bias":
                x = 0.5 * x
        return jax.numpy.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """`random_params(model, seed=0)`: see `draw_params`."""
    return draw_params


@contextlib.contextmanager
def _few_optimizations() -> Iterator[None]:
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def fast_compile() -> Iterator[None]:
    """XLA compiles a module's programs with few optimizations, in half the time.

    Tests of the numbers of `model/` and of the step keep the optimizations that users get.
    """
    with _few_optimizations():
        yield


@pytest.fixture
def fast_compile_once() -> Iterator[None]:
    """`fast_compile` for one test of a module."""
    with _few_optimizations():
        yield


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """One entry for everything that jax compiles while the test runs, small operations included."""
    import jax

    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def disk_order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Each `fsync`, with the bytes that the file then holds, and each rename, with the new name."""
    done: list[tuple[str, object]] = []
    rename = os.replace

    def replace(source: Any, target: Any) -> None:
        done.append(("renamed", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: done.append(("synced", os.fstat(file).st_size)))
    monkeypatch.setattr(os, "replace", replace)
    return done


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, its token shards, and a run that was trained on it; see tests/tiny.py."""
    from tests.tiny import train_tiny

    root = tmp_path_factory.mktemp("tiny")
    with _few_optimizations():
        train_tiny(root)
    return root


@pytest.fixture
def run_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """`run_program("sample", words)`: exit code, stdout, stderr and the error behind the exit.

    The program runs in this process, and leaves its signals and its settings of jax alone. It is
    train, sample or tools (`python -m sheepop_jax`).
    """
    import sample
    import train
    from sheepop_jax import __main__ as tools
    from sheepop_jax.runtime import platform
    from sheepop_jax.training.signals import StopSignal
    from tests.tiny import MACHINE

    mains = {"train": train.main, "sample": sample.main, "tools": tools.main}
    monkeypatch.setattr(platform, "prepare", lambda *asked: MACHINE)
    monkeypatch.setattr(StopSignal, "install", lambda self: self)

    def run(
        program: str, words: list[str], stdin: bytes = b""
    ) -> tuple[Any, str, str, BaseException | None]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        error = None
        try:
            code: Any = mains[program](words) or 0
        except SystemExit as left:
            code, error = left.code, left.__context__
        return code, *capsys.readouterr(), error

    return run
