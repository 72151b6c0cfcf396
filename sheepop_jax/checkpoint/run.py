"""The run directory: made or checked before training, opened for sampling and evaluating.

It is self-contained: `config.json`, `tokenizer.json`, `metrics.jsonl`, `training_curve.png`,
`checkpoints/`. Copied to another machine, it still samples;
evaluating it there needs a text file or the data.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sheepop_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint
from sheepop_jax.config.schema import Config
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.shards import PreparedData, open_shards
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.faults import fault_point
from sheepop_jax.model.quantize import quantized
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.step import init_params

log = logging.getLogger(__name__)

# Fields that make a run what it is; a resumed run must not change them, but for SAME_NUMBERS, and
# for another split of the same update into microbatches. All others may change.
IDENTITY = (
    "seed",
    "model",
    "data.seq_len",
    "data.packing",
    "data.document_mask",
    "optimizer.name",  # its state cannot be taken over
    "train.batch_size",
    "train.grad_accum_steps",
)
SAME_NUMBERS = ("model.remat",)  # memory against time; no other result


@dataclass(frozen=True)
class Run:
    """A run directory, opened for reading; nothing in it is ever executed.

    Attributes:
        directory: where it is.
        config: as resolved when it was trained.
        tokenizer: the run's own.
        data_identity: what decided its tokens and their order.
        gzip_bits_per_byte: of `gzip -9` on the run's held-out bytes.
        shards: where its tokens were, on the machine that trained it.
    """

    directory: Path
    config: Config
    tokenizer: Tokenizer
    data_identity: dict[str, Any]
    gzip_bits_per_byte: float
    shards: Path

    @property
    def checkpoints(self) -> Checkpoints:
        """The saved steps."""
        return Checkpoints(self.directory / "checkpoints")

    def model(self, dtype: Any = jnp.float32) -> Transformer:
        """The architecture, with the attention that decodes and evaluates anywhere."""
        return Transformer(self.config.model, self.tokenizer.vocab_size, dtype)

    def params(
        self, step: str | int = "latest", quantize: Literal["int8"] | None = None
    ) -> tuple[Any, int]:
        """Parameters of "latest", "best" or a number, on the first device; and the step.

        They are fp32, or their matrices int8 (`model.quantize`).

        Raises:
            InputError: no such checkpoint, or it is damaged.
        """
        found = self.checkpoints.resolve(step)
        target = jax.eval_shape(lambda: init_params(self.model(), 0))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: leaf.update(sharding=here), target)
        try:
            params = self.checkpoints.restore_params(found, target)
        except DamagedCheckpoint as damage:
            others = ", ".join(str(s) for s in self.checkpoints.steps() if s != found)
            hint = f"one of {others}" if others else "another run: this one has no other"
            raise InputError("--step", step, f"a whole checkpoint ({damage})", hint) from None
        return quantized(params) if quantize == "int8" else params, found

    def held_out(self) -> PreparedData:
        """The data of the run: its shards, if they are still there, or made again from its source.

        Raises:
            InputError: the source is not here, or no longer what the run was trained on.
        """
        hint = "evaluate --data FILE, on any text file"
        with contextlib.suppress(InputError):
            data = open_shards(self.shards)
            if _text_of(data.identity) == _text_of(self.data_identity):
                return data
        try:
            data = prepare(self.config.data)
        except InputError as error:
            raise InputError(
                f"{self.directory}: its held-out text",
                f"an error ({error})",
                "the data that the run was trained on",
                hint,
            ) from None
        if _text_of(data.identity) != _text_of(self.data_identity):
            changed = _difference(self.data_identity, data.identity)
            raise InputError(
                f"{self.directory}: its data", changed, "the same as in training", hint
            )
        return data


def open_run(path: str | Path) -> Run:
    """Opens a run directory.

    Raises:
        InputError: it is not one.
    """
    directory = Path(path)
    if not (directory / "config.json").is_file():
        beside = directory if directory.is_dir() else directory.parent
        runs = (
            sorted(p.parent.name for p in beside.glob("*/config.json")) if beside.is_dir() else []
        )
        hint = f"one of {', '.join(runs)} in {beside}" if runs else "train.py first"
        for above in directory.absolute().parents[:2]:  # RUN/checkpoints/STEP
            if (above / "config.json").is_file():
                hint = f"--ckpt {above}, with --step"
        raise InputError("--ckpt", str(path), "a run directory (with config.json)", hint)
    try:
        saved = json.loads((directory / "config.json").read_text())
        config = Config.from_dict(saved["config"])
        identity, gzip_figure = dict(saved["data"]), saved["gzip_bits_per_byte"]
        shards, vocab_size = Path(saved["shards"]), int(saved["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError(str(directory / "config.json"), got, "a run's configuration") from None
    if not (directory / "tokenizer.json").is_file():
        raise InputError(str(directory / "tokenizer.json"), "no file", "the run's tokenizer")
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    if tokenizer.vocab_size != vocab_size:
        got, expected = f"{tokenizer.vocab_size} tokens", f"the run's {vocab_size}"
        raise InputError(str(directory / "tokenizer.json"), got, expected)
    return Run(directory, config, tokenizer, identity, gzip_figure, shards)


def check_run(directory: Path, config: Config) -> None:
    """Compares a configuration with that of the run in a directory, if there is one.

    Raises:
        InputError: a run cannot go on with it; the message says how they differ.
    """
    if not (directory / "config.json").exists():
        return
    saved = open_run(directory).config
    changes = _changes(saved, config)
    fixed = {n for n in changes if n in IDENTITY or n.split(".")[0] in IDENTITY}
    fixed -= set(SAME_NUMBERS)
    if config.train.sequences_per_update == saved.train.sequences_per_update:
        fixed -= {"train.batch_size", "train.grad_accum_steps"}  # the same windows an update
    if fixed:
        changed = ", ".join(f"{name} {changes[name]}" for name in sorted(fixed))
        expected = "the configuration of the run that is there"
        raise InputError(str(directory), changed, expected, "another --workdir")


def create_run(directory: Path, config: Config, data: PreparedData) -> None:
    """Writes a new run's configuration and tokenizer, or goes on with one that `check_run` took.

    Raises:
        InputError: the run in the directory was trained on other data.
    """
    path = directory / "config.json"
    if path.exists():
        run = open_run(directory)
        changes = _changes(run.config, config)
        if data.identity != run.data_identity:
            said = [f"{name} {changes[name]}" for name in sorted(changes) if _decides_data(name)]
            if not said and data.identity["source"] != run.data_identity["source"]:
                said = ["the text is not what it was when the run began"]
            why = ", ".join([*said, _difference(run.data_identity, data.identity)])
            expected = "the data of the run that is there"
            raise InputError(str(directory), f"other data ({why})", expected, "another --workdir")
        for name in sorted(changes):
            log.info("changed since the run began: %s %s", name, changes[name])
    else:
        (directory / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
        fault_point("config-write")
    record = {
        "config": config.to_dict(),
        "vocab_size": data.tokenizer.vocab_size,
        "data": data.identity,
        "gzip_bits_per_byte": data.gzip_bits_per_byte,
        "shards": str(data.directory),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy", "grain")},
    }
    pending = path.with_suffix(".pending")
    pending.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(pending, path)


class WorkdirLock:
    """Holds a run directory for this process; the kernel frees the lock of a dead one."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __enter__(self) -> None:
        path = self._directory / "lock"
        try:
            str(self._directory).encode()
        except UnicodeEncodeError:  # libraries below take names as UTF-8
            expected = "a name that is valid UTF-8"
            raise InputError("--workdir", ascii(str(self._directory)), expected) from None
        try:
            self._made = not self._directory.exists()
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            got = f"{self._directory} ({error.strerror})"
            raise InputError("--workdir", got, "a directory that can be written") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise InputError(
                "--workdir", f"{self._directory}, in use by {owner}", "a free one"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{socket.gethostname()}, pid {os.getpid()}")
        self._file.flush()

    def __exit__(self, *exception: object) -> None:
        if [entry.name for entry in self._directory.iterdir()] == ["lock"]:
            # Bad input, found before there was a run: leave nothing behind.
            (self._directory / "lock").unlink()
            if self._made:
                self._directory.rmdir()
        self._file.close()


def _text_of(identity: dict[str, Any]) -> dict[str, Any]:
    """A data's identity without what decides only the order in which it is trained on."""
    return {name: value for name, value in identity.items() if name != "grain"}


def _decides_data(field: str) -> bool:
    return field.startswith("data.") and field != "data.cache_dir"


def _changes(old: Config, new: Config) -> dict[str, str]:
    """Field → "old -> new", of those that differ; a mixture's sources may come and go."""
    before, after = _flatten(old.to_dict()), _flatten(new.to_dict())

    def shown(value: Any) -> str:
        return "nothing" if value in ("", None) else str(value)

    return {
        name: f"{shown(before.get(name))} -> {shown(after.get(name))}"
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{n} {str(old.get(n))[:12]} -> {str(new.get(n))[:12]}" for n in names)
