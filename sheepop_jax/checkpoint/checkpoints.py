"""Checkpoints of a run: saved whole or not at all, verified before they are loaded.

PackingConfig, one directory a step, that appears by a single rename:

    checkpoints/00000500/params/         the model's parameters (orbax)
                         optimizer/      step counts and the optimizer's state (orbax)
                         manifest.json   written last: step, figures, size and SHA-256 of every file

A step directory without a manifest is damage. Names that begin with `.pending-` or
`.deleted-` are unfinished saves or deletions, swept away by the next save or resume.
"""

import logging
import math
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sheepop_jax.checkpoint import storage
from sheepop_jax.checkpoint.host_copy import all_finite, host_copy, not_finite
from sheepop_jax.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    digests,
    read_manifest,
    verify,
    write_manifest,
)
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.faults import fault_during, fault_point
from sheepop_jax.runtime import distributed
from sheepop_jax.training.step import TrainState

log = logging.getLogger(__name__)

BEST_METRIC = "val_loss"  # the figure, lower is better, by which a checkpoint is "best"
ASIDE = "damaged"  # what the names of directories that were set aside begin with
REASON = "REASON.txt"  # in such a directory
_STEP = "(?:[0-9]{8}|[1-9][0-9]{8,})"  # a step, in eight digits or as many as it takes


class SaveFailed(RunFailed):
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
        return sorted(int(path.name) for path in self._directories(_STEP))

    def aside(self) -> list[tuple[Path, int]]:
        """Directories that were set aside, and their steps."""
        found = self._directories(rf"{ASIDE}-{_STEP}-[0-9]+")
        return [(path, int(path.name.split("-")[1])) for path in sorted(found)]

    def path(self, step: int) -> Path:
        """The directory of a step, there or not."""
        return self.directory / f"{step:08d}"

    def best(self) -> int | None:
        """The step with the lowest validation loss; None when no checkpoint was evaluated."""
        scored = self._scored()
        return min(scored)[1] if scored else None

    def best_score(self) -> float:
        """The lowest validation loss; infinite when no checkpoint was evaluated."""
        scored = self._scored()
        return min(scored)[0] if scored else math.inf

    def manifest(self, step: int) -> dict[str, Any]:
        """What was recorded with a step: `step`, `figures`, `files`.

        Raises:
            DamagedCheckpoint: there is no readable manifest.
        """
        return read_manifest(self.path(step), step)

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
        return verify(self.path(step), step)

    def save(self, state: TrainState, figures: dict[str, Any]) -> None:
        """Starts saving a state; returns as soon as the state may be donated again.

        Raises:
            SaveFailed: the previous save failed, or a parameter is not finite.
        """
        self.wait()
        step = int(state.step)
        if not all_finite(state.params):
            raise SaveFailed(
                f"{self.path(step)}: not saved (not finite: {not_finite(state.params)}); older "
                "checkpoints are intact; try a lower optimizer.learning_rate from there"
            )
        self._pending = self._writer.submit(self._commit, step, host_copy(state), figures)

    def record(self, step: int, figures: dict[str, Any]) -> None:
        """Adds figures to a committed step's.

        Raises:
            SaveFailed: they could not be written.
        """
        saved = self.manifest(step)
        pending = self.directory / f".pending-{step:08d}-manifest"
        try:
            write_manifest(pending, saved["files"], step, saved["figures"] | figures)
            os.replace(pending, self.path(step) / MANIFEST)
        except OSError as error:
            raise SaveFailed(f"{self.path(step)}: no figures added ({error.strerror})") from error

    def wait(self) -> None:
        """Blocks until the save in hand is committed, and raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Loads a step that `verify` passed into the abstract `target`: shapes, dtypes, shardings.

        Raises:
            InputError: it is another model's or optimizer's; says how they differ.
        """
        items = self._load(step, params=target.params, optimizer=_optimizer_item(target))
        counts = items["optimizer"]
        return TrainState(counts["step"], counts["updates"], items["params"], counts["opt_state"])

    def restore_params(self, step: int, target: Any) -> Any:
        """Loads only the parameters of a step, which is verified first."""
        self.verify(step)
        return self._load(step, params=target)["params"]

    def quarantine(self, step: int, reason: object) -> Path:
        """Renames a damaged step so that it is neither loaded nor in the way; nothing is lost."""
        aside = self._unused(f"{ASIDE}-{step:08d}")
        os.rename(self.path(step), aside)
        try:
            (aside / REASON).write_text(f"{reason}\n", encoding="utf-8")
        except OSError as error:
            log.warning("%s: not written (%s)", aside / REASON, error.strerror)
        return aside

    def tidy(self) -> None:
        """Deletes what a killed process left half-written, half-deleted or not yet deleted."""
        self._sweep()
        self._prune()

    def delete(self, step: int) -> None:
        """Deletes a step: gone by one rename, whatever becomes of its files."""
        doomed = self._unused(f".deleted-{step:08d}")
        os.rename(self.path(step), doomed)
        fault_point("mid-prune", before=lambda: (doomed / MANIFEST).unlink())
        _remove(doomed)

    def _scored(self) -> list[tuple[float, int]]:
        """Validation loss and step of every checkpoint that has a finite one."""
        scored = []
        for step in self.steps():
            try:
                score = self.manifest(step)["figures"].get(BEST_METRIC)
            except DamagedCheckpoint:
                continue
            if score is not None and math.isfinite(score):
                scored.append((score, step))
        return scored

    def _directories(self, pattern: str) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [p for p in self.directory.iterdir() if re.fullmatch(pattern, p.name) and p.is_dir()]

    def _unused(self, name: str) -> Path:
        number = 0
        while os.path.lexists(path := self.directory / f"{name}-{number}"):
            number += 1
        return path

    def _load(self, step: int, **targets: Any) -> Any:
        for name, target in targets.items():
            self._compare(step, name, target)
        return storage.read(self.path(step), targets)

    def _compare(self, step: int, name: str, target: Any) -> None:
        """Holds what a step has against the target, before anything large is allocated."""
        if difference := storage.difference(self.path(step) / name, target):
            raise InputError(
                str(self.path(step) / name),
                difference,
                "the arrays of this configuration's model and optimizer",
                "the configuration that it was trained with, or another --workdir",
            )

    def _commit(self, step: int, state: TrainState, figures: dict[str, Any]) -> None:
        try:
            self._write(step, state, figures)
        except Exception as error:  # orbax reports a full disk in more than one way
            free = shutil.disk_usage(self.directory.parent).free / 1e6
            reason = " ".join(str(error).split())
            if len(reason) > 240:  # a file within, and at the end why
                reason = f"{reason[:100]} ... {reason[-140:]}"
            raise SaveFailed(
                f"{self.path(step)}: not saved ({reason}); {free:,.0f} MB free there; older "
                "checkpoints are intact"
            ) from error
        if distributed.is_main_process():
            self._prune()

    def _write(self, step: int, state: TrainState, figures: dict[str, Any]) -> None:
        """All processes write their part; the first begins and commits, and the others wait."""
        fault_point("save-begun")
        if distributed.is_main_process():
            self._sweep()
        pending = self.directory / f".pending-{step:08d}"
        items = {"params": state.params, "optimizer": _optimizer_item(state)}
        fault_during("save-writing", begun=lambda: storage.has_begun(pending))
        storage.write(pending, items)
        fault_point("save-written")
        if distributed.is_main_process():
            self._publish(pending, step, figures)
        storage.wait_for_all(f"commit {step}")

    def _publish(self, pending: Path, step: int, figures: dict[str, Any]) -> None:
        files = digests(pending)
        fault_point("before-manifest")
        write_manifest(pending / MANIFEST, files, step, figures)
        fault_point("before-rename")
        if self.path(step).exists():  # an earlier run of the same steps
            self.delete(step)
        os.rename(pending, self.path(step))
        fault_point("after-rename")
        log.info("saved step %d", step)

    def _prune(self) -> None:
        kept = {*self.steps()[-self._keep :], self.best()}
        for step in self.steps():
            if step not in kept:
                try:
                    self.delete(step)
                except OSError as error:  # the save is done: no reason to end the run
                    log.warning("%s: not deleted (%s)", self.path(step), error.strerror or error)

    def _sweep(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in self.directory.iterdir():
            if entry.name.startswith((".pending-", ".deleted-")):
                _remove(entry)


def _remove(path: Path) -> None:
    """Deletes a directory or file, or a link but not what it leads to; what stays is said."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning(
            "%s: not deleted (%s); it may be deleted by hand", path, error.strerror or error
        )


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "updates": state.updates, "opt_state": state.opt_state}
