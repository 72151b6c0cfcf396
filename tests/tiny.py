"""The smallest run that training leaves, for tests of the programs around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from configs import base
from sheepop_jax import pipeline
from sheepop_jax.config.schema import Config
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.model.partitioning import make_mesh
from sheepop_jax.runtime.devices import Runtime

MACHINE = Runtime("cpu", "cpu", 8, 0.0)
TINY: dict[str, Any] = {
    "model.d_model": 24,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.d_ff": 40,
    "model.max_seq_len": 32,
    "data.tokenizer": "char",
    "data.seq_len": 16,
    "optimizer.warmup_steps": 1,
    "train.platform": "cpu",
    "train.num_steps": 4,
    "train.batch_size": 8,
    "train.grad_accum_steps": 1,
    "train.eval_every": 2,
    "train.sample_tokens": 0,
    "checkpoint.save_every": 2,
}
TEXT = "".join(f"line {i} says {i * i}\n" for i in range(120))
SAYS = "says " * 8  # 40 tokens, where the context holds 32


def tiny(root: Path) -> dict[str, Any]:
    """The fields of the run in `root`."""
    return {**TINY, "data.path": str(root / "text.txt"), "data.cache_dir": str(root / "cache")}


def overrides(fields: dict[str, Any]) -> list[str]:
    """The flags that set them."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


@contextmanager
def one_device() -> Iterator[None]:
    """Training takes the first device only: one device compiles in half the time of eight."""
    with mock.patch.object(
        pipeline, "make_mesh", lambda config, devices: make_mesh(config, devices[:1])
    ):
        yield


def train_tiny(root: Path) -> None:
    """Leaves `root/run` with checkpoints 2 and 4, its text and its token shards."""
    (root / "text.txt").write_text("<|endoftext|>\u00e9\n" + TEXT, encoding="utf-8")
    config = base.get_config()
    config.update_from_flattened_dict(tiny(root))
    with one_device():
        pipeline.train(Config.from_dict(config), root / "run", MACHINE)
    prepare(Config.from_dict(config).data)  # the cache notes the text when it is used again
