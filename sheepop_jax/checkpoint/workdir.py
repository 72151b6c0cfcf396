"""The run directory of a training process: created or checked, locked, and held."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sheepop_jax.checkpoint.run import difference, open_run
from sheepop_jax.config.schema import SCHEMA, Config
from sheepop_jax.data.shards import PreparedData
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.faults import fault_point
from sheepop_jax.files import try_lock, write_atomic

log = logging.getLogger(__name__)

# Fields that a resumed run must not change, except SAME_NUMBERS and a different split of the same
# update into microbatches. All other fields may change.
IDENTITY = (
    "seed",
    "model",
    "data.seq_len",
    "data.packing",
    "data.document_mask",
    "optimizer.name",  # optimizer states are incompatible
    "train.batch_size",
    "train.grad_accum_steps",
    "train.init_from",
    "train.lora_rank",
    "train.lora_alpha",
)
SAME_NUMBERS = ("model.remat",)  # trades memory for time; same results
# The entry of `config.json` that says where the first parameters came from (`train.init_from`).
ORIGIN = "init_from"
# What training writes in the run directory, hours after it began.
_FILES = ("tokenizer.json", "metrics.jsonl", "train.log", "training_curve.png")
_DIRECTORIES = (".", "checkpoints")
_BY_DESCRIPTOR = Path("/proc/self/fd")  # links to the open files, on Linux
_PRINT_PATH = "import os, sys; os.fchdir(int(sys.argv[1])); sys.stdout.write(os.getcwd())"
_PRINT_SECONDS = 60


def check_run(directory: Path, config: Config) -> None:
    """Checks that a directory can be written, and that its run, if any, fits a configuration.

    Raises:
        InputError: something is in the way or not writable, the run is an imported model, or a
            fixed field differs; the message lists the differences.
    """
    _check_places(directory)
    if not (directory / "config.json").exists():
        return
    run = open_run(directory)
    if run.imported:
        hint = f"another `workdir` with `train.init_from={directory}`"
        raise InputError("workdir", f"{directory} (an imported model)", "a run to resume", hint)
    saved = run.config
    changes = _changes(saved, config)
    fixed = {n for n in changes if n in IDENTITY or n.split(".")[0] in IDENTITY}
    fixed -= set(SAME_NUMBERS)
    if config.train.sequences_per_update == saved.train.sequences_per_update:
        fixed -= {"train.batch_size", "train.grad_accum_steps"}  # same windows per update
    fixed |= _certainly_other_data(saved, config) & changes.keys()
    if fixed:
        changed = ", ".join(f"{name} {changes[name]}" for name in sorted(fixed))
        expected = "the configuration of the existing run"
        raise InputError(str(directory), changed, expected, "another `workdir`")
    for name in sorted(changes):
        log.info("changed since the run started: %s %s", name, changes[name])


def _certainly_other_data(saved: Config, config: Config) -> set[str]:
    """The fields whose change gives other data, known without reading the text.

    Otherwise `create_run` decides: the same text may have moved to another path.
    """
    fields = {"data.val_split", "data.val_fraction"}
    if (saved.data.resolved_source == "stdlib") != (config.data.resolved_source == "stdlib"):
        fields |= {"data.source", "data.path", "data.name"}
    if {saved.data.tokenizer, config.data.tokenizer} == {"bpe", "char"}:
        fields.add("data.tokenizer")
    if config.data.is_chat:
        fields |= {"data.format", "data.chat_template", "data.chat_loss"}
    return fields


def _check_places(directory: Path) -> None:
    """Checks before training what is otherwise found at the first save; leaves no trace."""
    for path in (directory / name for name in _FILES):
        if path.exists() and not path.is_file():
            raise InputError(str(path), "not a regular file", "a file or nothing", "removing it")
    for path in (directory / name for name in _DIRECTORIES):
        if not os.path.lexists(path):
            continue
        if not path.is_dir():
            got = "a broken link" if path.is_symlink() and not path.exists() else "a file"
            raise InputError(str(path), got, "a directory or nothing", "removing it")
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise InputError(str(path), error.strerror, "a writable directory") from None


def create_run(
    directory: Path, config: Config, data: PreparedData, vocab_size: int | None = None
) -> None:
    """Writes the configuration and tokenizer of a new run, or updates those of a checked run.

    Args:
        directory: the run directory.
        config: the configuration.
        data: the prepared data.
        vocab_size: of the model; None is that of the data's tokenizer.

    Raises:
        InputError: the run in the directory was trained on other data.
    """
    path, kept = directory / "config.json", {}
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: saved[name] for name in (ORIGIN,) if name in saved}
        run = open_run(directory)
        changes = _changes(run.config, config)
        if data.identity != run.data_identity:
            said = [f"{name} {changes[name]}" for name in sorted(changes) if _decides_data(name)]
            if not said and data.identity["source"] != run.data_identity["source"]:
                said = ["the text, or how this version reads it, has changed since the run started"]
            why = ", ".join([*said, difference(run.data_identity, data.identity)])
            expected = "the data of the existing run"
            raise InputError(str(directory), f"other data ({why})", expected, "another `workdir`")
    else:
        (directory / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
        fault_point("config-write")
    record = {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "vocab_size": vocab_size or data.tokenizer.vocab_size,
        "data": data.identity,
        "gzip_bits_per_byte": data.gzip_bits_per_byte,
        "shards": str(data.directory),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy", "grain")},
        **kept,
    }
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def record_origin(directory: Path, origin: dict[str, Any]) -> None:
    """Adds to a run's `config.json` where its first parameters came from."""
    path = directory / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    write_atomic(path, json.dumps({**saved, ORIGIN: origin}, indent=1) + "\n")


class DirectoryLost(RunFailed):
    """The run directory was deleted, or moved to a place that cannot be found."""


class HeldDirectory:
    """A directory held open, so that a rename or a deletion is noticed, and a rename is followed.

    Attributes:
        path: its path when it was opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._by_descriptor = _BY_DESCRIPTOR / str(self._descriptor)

    def where(self) -> Path:
        """Its path now: `path` unless it was renamed; costs one stat if it was not.

        Raises:
            DirectoryLost: it was deleted, or its new path is unknown.
        """
        try:
            mine = os.fstat(self._descriptor)
            if _is_same(self.path, mine):
                return self.path
            if mine.st_nlink and self._by_descriptor.is_dir():  # Linux
                renamed = self._by_descriptor.readlink()
                # Another machine may have renamed it, without this kernel knowing the new name.
                return renamed if _is_same(renamed, mine) else self._by_descriptor
            if mine.st_nlink and (path := self._printed_path()) and _is_same(path, mine):
                return path
        except OSError as error:
            raise DirectoryLost(f"{self.path}: lost during training ({error.strerror})") from None
        raise DirectoryLost(
            f"{self.path}: deleted or renamed during training; nothing is saved; if it was "
            "renamed, resume it from its new place"
        )

    def fixed(self, name: str) -> Path:
        """The path of an entry that stays valid if the directory is renamed, on Linux only."""
        return (self._by_descriptor if self._by_descriptor.is_dir() else self.where()) / name

    def _printed_path(self) -> Path | None:
        """Its path as the working directory of a new process; None if it has none.

        The working directory of this process is left alone: its threads may use relative paths.
        """
        words = [sys.executable, "-ISc", _PRINT_PATH, str(self._descriptor)]
        try:
            printed = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                pass_fds=[self._descriptor],
                timeout=_PRINT_SECONDS,
            ).stdout
        except subprocess.SubprocessError:  # it was deleted
            return None
        return Path(os.fsdecode(printed))

    def close(self) -> None:
        """Releases the directory."""
        os.close(self._descriptor)


def _is_same(path: Path, found: os.stat_result) -> bool:
    """Whether a path leads to a directory; also if that cannot be told at the moment."""
    try:
        return os.path.samestat(os.stat(path), found)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


class WorkdirLock:
    """Locks a run directory for this process; the kernel releases the lock of a dead process."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __enter__(self) -> None:
        path = self._directory / "lock"
        try:
            str(self._directory).encode()
        except UnicodeEncodeError:  # the libraries require UTF-8 paths
            expected = "a valid UTF-8 path"
            raise InputError("workdir", ascii(str(self._directory)), expected) from None
        try:
            self._made = not self._directory.exists()
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            got = f"{self._directory} ({error.strerror})"
            raise InputError("workdir", got, "a writable directory") from None
        try:
            locked = try_lock(self._file)
        except OSError:
            locked = False
        if not locked:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise InputError(
                "workdir", f"{self._directory} (in use by {owner})", "a directory not in use"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{socket.gethostname()}, pid {os.getpid()}")
        self._file.flush()

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # it was renamed or deleted meanwhile
            lock = self._directory / "lock"
            # After a rename, another run may have a directory of the old name.
            own = os.path.samestat(lock.stat(), os.fstat(self._file.fileno()))
            if own and os.listdir(self._directory) == ["lock"]:
                # Input was rejected before the run was created: leave nothing behind.
                lock.unlink()
                if self._made:
                    self._directory.rmdir()
        self._file.close()


def _decides_data(field: str) -> bool:
    return field.startswith("data.") and field != "data.cache_dir"


def _changes(old: Config, new: Config) -> dict[str, str]:
    """Field → "old -> new" of fields that differ, including added or removed mixture sources."""
    before, after = _flatten(old.to_dict()), _flatten(new.to_dict())

    def shown(value: Any) -> str:
        return "unset" if value in ("", None) else str(value)

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
