"""Checkpoints of a run: saved whole or not at all, verified before they are loaded.

Layout, one directory a step, that appears by a single rename:

    checkpoints/00000500/params/         the model's parameters (orbax)
                         optimizer/      step counts and the optimizer's state (orbax)
                         manifest.json   written last: step, figures, size and SHA-256 of every file

A step directory without a manifest is damage. Names that start with a dot are unfinished saves or
deletions, and are swept away by the next save.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sheepop_jax.errors import InputError
from sheepop_jax.training.step import TrainState

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
SCORE = "val_loss"  # the figure, lower is better, by which a checkpoint is "best"


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are not those that were saved; the message names the file."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the older ones are intact."""


class Checkpoints:
    """The checkpoints in one directory; saving goes on in the background."""

    def __init__(self, directory: Path, keep: int = 1):
        self.directory = directory
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (entry.name for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(name) for name in names if name.isdecimal() and len(name) == 8)

    def best(self) -> int | None:
        """The step with the lowest validation loss; None when no checkpoint was evaluated."""
        scored = []
        for step in self.steps():
            try:
                score = self.manifest(step)["figures"].get(SCORE)
            except DamagedCheckpoint:
                continue
            if score is not None and math.isfinite(score):
                scored.append((score, step))
        return min(scored)[1] if scored else None

    def manifest(self, step: int) -> dict[str, Any]:
        """What was recorded with a step: `step`, `figures`, `files`.

        Raises:
            DamagedCheckpoint: there is no readable manifest.
        """
        path = self._path(step) / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            if manifest.pop("sha256") != _manifest_digest(manifest) or manifest["step"] != step:
                raise DamagedCheckpoint(f"{path}: its content has changed")
            if manifest["format"] != FORMAT:
                raise DamagedCheckpoint(f"{path}: format {manifest['format']}, not {FORMAT}")
            return manifest
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path}: {error}") from None

    def resolve(self, step: str | int) -> int:
        """Turns "latest", "best" or a number into a committed step.

        Raises:
            InputError: there is none; the message lists what is usable.
        """
        steps = self.steps()
        if not steps:
            raise InputError(str(self.directory), "no checkpoint", "at least one", "training first")
        found = {"latest": steps[-1], "best": self.best()}.get(str(step))
        if found is None and str(step).isdecimal() and int(step) in steps:
            found = int(step)
        if found is None:
            usable = ", ".join(map(str, steps))
            raise InputError("--step", step, f"latest, best (when evaluated) or one of {usable}")
        return found

    def verify(self, step: int) -> dict[str, Any]:
        """Compares every file with the manifest, which is returned.

        Raises:
            DamagedCheckpoint: names the first file that is missing, added or changed.
        """
        manifest, root = self.manifest(step), self._path(step)
        present = set(_files(root))
        for name in sorted(present - manifest["files"].keys()):
            raise DamagedCheckpoint(f"{root / name}: not a file of this checkpoint")
        for name, recorded in manifest["files"].items():
            if name not in present:
                raise DamagedCheckpoint(f"{root / name}: missing")
            if _digest(root / name) != recorded:
                raise DamagedCheckpoint(f"{root / name}: its content has changed")
        return manifest

    def save(self, state: TrainState, figures: dict[str, Any]) -> None:
        """Starts saving a state; returns as soon as the state may be donated again.

        Raises:
            SaveFailed: the previous save failed.
        """
        self.wait()
        # On a CPU "device to host" is no copy, and the next step overwrites the donated buffers.
        state = jax.tree.map(jnp.copy, state)
        jax.block_until_ready(state)
        self._pending = self._writer.submit(self._commit, int(state.step), state, figures)

    def wait(self) -> None:
        """Blocks until the save in hand is committed, and raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Loads a verified step into the shapes, dtypes and shardings of an abstract `target`."""
        items = self._load(step, params=target.params, optimizer=_optimizer_item(target))
        counts = items["optimizer"]
        return TrainState(counts["step"], counts["updates"], items["params"], counts["opt_state"])

    def restore_params(self, step: int, target: Any) -> Any:
        """Loads only the parameters of a step, which is verified first."""
        return self._load(step, params=target)["params"]

    def set_aside(self, step: int) -> Path:
        """Renames a damaged step so that it is neither loaded nor in the way; nothing is lost."""
        for attempt in range(1000):
            aside = self.directory / f"damaged-{step:08d}-{attempt}"
            if not aside.exists():
                break
        os.rename(self._path(step), aside)
        return aside

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _load(self, step: int, **targets: Any) -> Any:
        self.verify(step)
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(
                self._path(step).absolute(), args=ocp.args.Composite(**args)
            )

    def _commit(self, step: int, state: TrainState, figures: dict[str, Any]) -> None:
        try:
            self._write(step, state, figures)
        except Exception as error:  # orbax reports a full disk in more than one way
            free = shutil.disk_usage(self.directory.parent).free / 1e6
            reason = " ".join(str(error).split())[:200]
            raise SaveFailed(
                f"{self._path(step)}: not saved ({reason}); {free:,.0f} MB free there; older "
                "checkpoints are intact"
            ) from error

    def _write(self, step: int, state: TrainState, figures: dict[str, Any]) -> None:
        self._sweep()
        pending = self.directory / f".pending-{step:08d}"
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(_optimizer_item(state)),
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(pending.absolute(), args=args)
        files = {name: _digest(pending / name) for name in _files(pending)}
        manifest = {"format": FORMAT, "step": step, "figures": figures, "files": files}
        with (pending / MANIFEST).open("w") as file:
            json.dump({**manifest, "sha256": _manifest_digest(manifest)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if self._path(step).exists():  # an earlier run of the same steps
            self._delete(step)
        os.rename(pending, self._path(step))
        log.info("saved step %d", step)
        self._prune()

    def _prune(self) -> None:
        kept = {*self.steps()[-self._keep :], self.best()}
        for step in self.steps():
            if step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        doomed = self.directory / f".deleted-{step:08d}"
        os.rename(self._path(step), doomed)
        shutil.rmtree(doomed)

    def _sweep(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in self.directory.iterdir():
            if entry.name.startswith((".pending-", ".deleted-")):
                shutil.rmtree(entry)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "updates": state.updates, "opt_state": state.opt_state}


def _files(root: Path) -> list[str]:
    """Relative names of all files of a checkpoint but the manifest."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
