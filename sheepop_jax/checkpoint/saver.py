"""Atomic background saves of checkpoints during training, with pruning.

A save writes a `.pending-` directory and commits it with one rename, so a process killed at any
time leaves older checkpoints intact. The next save or resume removes leftover `.pending-` and
`.deleted-` directories.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import jax

from sheepop_jax.checkpoint import storage
from sheepop_jax.checkpoint.checkpoints import (
    FORMAT,
    MANIFEST,
    QUARANTINED,
    REASON,
    Checkpoints,
    file_names,
)
from sheepop_jax.checkpoint.host_copy import all_finite, host_copy, not_finite
from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.checkpoint.workdir import DirectoryLost, HeldDirectory
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.faults import fault_during, fault_point
from sheepop_jax.files import sealed, sha256_of_file, write_atomic
from sheepop_jax.runtime import distributed

log = logging.getLogger(__name__)


class SaveFailed(RunFailed):
    """A checkpoint could not be written; older checkpoints are intact."""


class CheckpointSaver(Checkpoints):
    """Saves, restores, quarantines and prunes checkpoints during training.

    A background thread writes the files while training continues. With a held run directory, it
    follows a rename of that directory.
    """

    def __init__(self, directory: Path, keep: int = 1, held: HeldDirectory | None = None):
        super().__init__(directory)
        self._keep, self._held = keep, held
        self._pending: Future[None] | None = None

    def save(self, state: TrainState, figures: dict[str, Any]) -> None:
        """Starts a save; returns once the state may be donated.

        Raises:
            SaveFailed: the previous save failed, or a parameter is not finite.
        """
        self.wait()
        step = int(state.step)
        if not all_finite(state.params):
            raise SaveFailed(
                f"{self.path(step)}: not saved (not finite: {not_finite(state.params)}); older "
                "checkpoints are intact; try resuming with a lower optimizer.learning_rate"
            )
        copy = host_copy(state)
        items = {"params": copy.params, "optimizer": _optimizer_item(copy)}
        self._pending = self._start(step, items, figures)

    def save_params(self, params: Any) -> None:
        """Saves parameters alone as step 0, such as those of another program; no copy is made.

        Args:
            params: finite fp32 arrays on the CPU.

        Raises:
            SaveFailed: a file could not be written.
        """
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        self._commit(0, {"params": params}, {}, bytes_at_once=largest + 1)

    def record(self, step: int, figures: dict[str, Any]) -> None:
        """Adds figures to the manifest of a committed step.

        Raises:
            SaveFailed: the manifest could not be written.
        """
        saved = self.manifest(step)
        try:
            self._write_manifest(self.path(step), {**saved, "figures": saved["figures"] | figures})
        except OSError as error:
            raise SaveFailed(
                f"{self.path(step)}: metrics not recorded ({error.strerror})"
            ) from error

    def wait(self) -> None:
        """Waits for the current save to commit, and raises its exception if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Loads a verified step.

        Args:
            step: a step that `verify` accepted.
            target: an abstract state with shapes, dtypes and shardings.

        Raises:
            InputError: the arrays do not match `target`; lists the differences.
        """
        items = self._load(step, params=target.params, optimizer=_optimizer_item(target))
        counts = items["optimizer"]
        return TrainState(counts["step"], counts["updates"], items["params"], counts["opt_state"])

    def quarantine(self, step: int, reason: object) -> Path:
        """Renames a damaged step so that it is never loaded; keeps its files."""
        aside = self._unused(f"{QUARANTINED}-{step:08d}")
        os.rename(self.path(step), aside)
        try:
            (aside / REASON).write_text(f"{reason}\n", encoding="utf-8")
        except OSError as error:
            log.warning("%s: not written (%s)", aside / REASON, error.strerror)
        return aside

    def tidy(self) -> None:
        """Removes unfinished saves and deletions of a killed process, then prunes."""
        self._sweep()
        self._prune()

    def delete(self, step: int) -> None:
        """Deletes a step atomically: one rename, then its files."""
        doomed = self._unused(f".deleted-{step:08d}")
        os.rename(self.path(step), doomed)
        fault_point("mid-prune", before=lambda: (doomed / MANIFEST).unlink())
        _remove(doomed)

    def _unused(self, name: str) -> Path:
        number = 0
        while os.path.lexists(path := self.directory / f"{name}-{number}"):
            number += 1
        return path

    def _start(self, step: int, items: dict[str, Any], figures: dict[str, Any]) -> Future[None]:
        """Starts `_commit` in a daemon thread.

        The threads of orbax inherit that. After a failed save some of them wait ten minutes for a
        directory that was not made, and the process must not wait for them when it ends.
        """
        done: Future[None] = Future()

        def commit() -> None:
            try:
                self._commit(step, items, figures)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=commit, name=f"checkpoint {step}", daemon=True).start()
        return done

    def _commit(
        self,
        step: int,
        items: dict[str, Any],
        figures: dict[str, Any],
        bytes_at_once: int | None = None,
    ) -> None:
        try:
            self._write(step, items, figures, bytes_at_once)
        except DirectoryLost:
            raise
        except Exception as error:  # orbax reports a full disk by several exception types
            self._follow()  # raises if the directory was deleted meanwhile
            free = shutil.disk_usage(self.directory.parent).free / 1e6
            named = re.sub(r"/proc/self/fd/[0-9]+", str(self.directory.parent), str(error))
            reason = " ".join(named.split())
            if len(reason) > 240:  # keep the file name at the start and the cause at the end
                reason = f"{reason[:100]} ... {reason[-140:]}"
            raise SaveFailed(
                f"{self.path(step)}: not saved ({reason}); {free:,.0f} MB free; older "
                "checkpoints are intact"
            ) from error
        if distributed.is_main_process():
            self._prune()

    def _write(
        self,
        step: int,
        items: dict[str, Any],
        figures: dict[str, Any],
        bytes_at_once: int | None = None,
    ) -> None:
        """Every process writes its shards; the main process commits, the others wait."""
        fault_point("save-begun")
        self._follow()
        if distributed.is_main_process():
            self._sweep()
        pending = self._write_arrays(f".pending-{step:08d}", items, bytes_at_once)
        fault_point("save-written")
        if distributed.is_main_process():
            self._publish(pending, step, figures)
        storage.wait_for_all(f"commit {step}")

    def _write_arrays(self, name: str, items: dict[str, Any], bytes_at_once: int | None) -> Path:
        """Writes the arrays to a new directory; again if a rename has led them elsewhere."""
        while True:
            pending, failure = self._fixed() / name, None
            fault_during("save-writing", begun=partial(storage.has_begun, pending))
            try:
                storage.write(pending, items, bytes_at_once)
            except Exception as error:
                failure = error
            if distributed.count() > 1 or self._fixed() == pending.parent:
                if failure:
                    raise failure
                return pending
            self._follow()
            # orbax may have created the run directory again, under its old name.
            shutil.rmtree(pending, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another run's
                pending.parent.rmdir()
                pending.parent.parent.rmdir()

    def _follow(self) -> None:
        """Continues in the run directory if it was renamed."""
        if self._held:
            self.directory = self._held.where() / self.directory.name

    def _fixed(self) -> Path:
        """The directory by a path that a rename does not change.

        By name, writing would create a directory again that is renamed meanwhile. Several processes
        need the same path.
        """
        if self._held is None or distributed.count() > 1:
            return self.directory
        return self._held.fixed(self.directory.name)

    def _publish(self, pending: Path, step: int, figures: dict[str, Any]) -> None:
        own = [name for name in file_names(pending) if not _is_foreign(name)]
        files = {name: sha256_of_file(pending / name) for name in own}
        fault_point("before-manifest")
        manifest = {"format": FORMAT, "step": step, "figures": figures, "files": files}
        self._write_manifest(pending, manifest)
        fault_point("before-rename")
        if self.path(step).exists():  # from an earlier run of the same step
            self.delete(step)
        os.rename(pending, pending.with_name(self.path(step).name))
        fault_point("after-rename")
        log.info("saved step %d", step)

    def _write_manifest(self, root: Path, manifest: dict[str, Any]) -> None:
        write_atomic(root / MANIFEST, json.dumps(sealed(manifest), indent=1))

    def _prune(self) -> None:
        try:
            kept = {*self.steps()[-self._keep :], self.best()}
        except InputError as error:  # without all manifests, the best is unknown
            log.warning("no old checkpoint deleted: %s", error)
            return
        for step in self.steps():
            if step not in kept:
                try:
                    self.delete(step)
                except OSError as error:  # a failed deletion must not end the run
                    log.warning("%s: not deleted (%s)", self.path(step), error.strerror or error)

    def _sweep(self) -> None:
        directory = self._fixed()
        directory.mkdir(exist_ok=True)
        for entry in directory.iterdir():
            if entry.name.startswith((".pending-", ".deleted-")):
                _remove(entry)


def _remove(path: Path) -> None:
    """Deletes a directory, file or link (not its target); logs a warning on failure."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s: not deleted (%s); delete it manually", path, error.strerror or error)


def _is_foreign(name: str) -> bool:
    """Whether a file manager or synchronization client made a file; orbax uses no such names.

    It may change or go at any time, so the manifest must not list it.
    """
    last = name.rpartition("/")[2]
    return last.startswith((".", "~")) or last.lower() in ("desktop.ini", "thumbs.db")


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "updates": state.updates, "opt_state": state.opt_state}
