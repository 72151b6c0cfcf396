"""Checkpoints of a run: committed atomically, verified before loading.

One directory per step, committed by a single rename:

    checkpoints/00000500/params/         the model's parameters (orbax)
                         optimizer/      step counters and the optimizer state (orbax)
                         manifest.json   written last: step, figures, SHA-256 of every file

A step directory without a manifest is damaged. Names that begin with `.pending-` or `.deleted-`
are unfinished saves or deletions; the next save or resume removes them. Files that the manifest
does not list, such as those of a file manager or a synchronization client, are ignored.
"""

import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sheepop_jax.checkpoint import storage
from sheepop_jax.errors import InputError
from sheepop_jax.files import read_sealed, sha256_of_file

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
BEST_METRIC = "val_loss"  # selects the best checkpoint; lower is better
QUARANTINED = "damaged"  # name prefix of quarantined directories
REASON = "REASON.txt"  # file in a quarantined directory
_STEP = "(?:[0-9]{8}|[1-9][0-9]{8,})"  # a step, zero-padded to eight digits
_ABSENT = (FileNotFoundError, NotADirectoryError)  # there is no such file

T = TypeVar("T")


class DamagedCheckpoint(Exception):
    """A checkpoint file is missing or changed; the message names it."""


class Checkpoints:
    """Read access to the checkpoints in a directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(int(path.name) for path in self._directories(_STEP))

    def aside(self) -> list[tuple[Path, int]]:
        """Quarantined directories and their steps."""
        found = self._directories(rf"{QUARANTINED}-{_STEP}-[0-9]+")
        return [(path, int(path.name.split("-")[1])) for path in sorted(found)]

    def path(self, step: int) -> Path:
        """The directory of a step, which may not exist."""
        return self.directory / f"{step:08d}"

    def best(self) -> int | None:
        """The step with the lowest validation loss; None if no checkpoint was evaluated."""
        scored = self._scored()
        return min(scored)[1] if scored else None

    def best_score(self) -> float:
        """The lowest validation loss; infinite if no checkpoint was evaluated."""
        scored = self._scored()
        return min(scored)[0] if scored else math.inf

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a step: `step`, `figures` (metrics), `files`.

        Raises:
            DamagedCheckpoint: the manifest is missing or invalid.
            InputError: the manifest cannot be read.
        """
        path = self.path(step) / MANIFEST
        try:
            manifest = read_sealed(path)
            if manifest["step"] != step:
                raise DamagedCheckpoint(f"{path}: step {manifest['step']}, not {step}")
            if manifest["format"] != FORMAT:
                raise DamagedCheckpoint(f"{path}: format {manifest['format']}, not {FORMAT}")
            return manifest
        except (*_ABSENT, IsADirectoryError, ValueError, KeyError) as error:
            raise DamagedCheckpoint(f"{path}: {error}") from None
        except OSError as error:
            raise _unreadable(path, error) from None

    def read(self, step: str | int | None, load: Callable[[int], T]) -> T:
        """Returns `load` of the step that `resolve` finds for `step`.

        A training process may delete that step meanwhile; then `step` is resolved again.

        Raises:
            InputError: no such step; the message lists the available ones.
        """
        while True:
            before, found = self.steps(), None
            try:
                found = self.resolve(step)
                return load(found)
            except Exception as error:
                gone = self.steps() != before if found is None else not self.path(found).is_dir()
                if not gone:
                    raise
                read = "the checkpoints" if found is None else f"step {found}"
                log.info("%s changed while being read (%s); trying again", read, error)

    def resolve(self, step: str | int | None = None) -> int:
        """Resolves "latest", "best" or a number to a committed step.

        None is the best among the checkpoints whose manifest is valid, or the latest of them if
        none was evaluated.

        Raises:
            InputError: no such step; the message lists the available ones.
        """
        # A listing can miss a step that is renamed meanwhile, as a save does just before it prunes.
        steps = self.steps() or self.steps()
        if not steps:
            raise InputError(str(self.directory), "no checkpoint", "at least one", "training first")
        best = self.best() if step in (None, "best") else None
        if step is None:
            damaged = self._warn_of_damaged_manifests()
            whole = [step for step in steps if step not in damaged] or steps
            return whole[-1] if best is None else best
        found = {"latest": steps[-1], "best": best}.get(str(step))
        if found is None and str(step).isdecimal() and int(step) in steps:
            found = int(step)
        if found is None:
            usable = ", ".join(map(str, steps))
            rule = f"latest, best or one of {usable}"
            if step == "best":
                rule = f"latest or one of {usable} (none has a validation loss)"
            raise InputError("step", step, rule)
        return found

    def _warn_of_damaged_manifests(self) -> set[int]:
        damaged = set()
        for step in self.steps():
            try:
                self.manifest(step)
            except DamagedCheckpoint as damage:
                if not self.path(step).exists():  # a training process has deleted it
                    continue
                log.warning("step %d is damaged and may have been the best (%s)", step, damage)
                damaged.add(step)
        return damaged

    def verify(self, step: int) -> dict[str, Any]:
        """Compares every file with the manifest and returns the manifest.

        Opens only files found in the directory: paths in a forged manifest are not followed. Files
        that are not in the manifest are ignored.

        Raises:
            DamagedCheckpoint: a file is missing or changed; names the first one.
            InputError: a file cannot be read, which says nothing about its content.
        """
        root, manifest = self.path(step), self.manifest(step)
        try:
            present = file_names(root)
        except OSError as error:
            raise _unreadable(root, error) from None
        if others := sorted(set(present) - manifest["files"].keys()):
            log.debug("%s: ignoring %s", root, ", ".join(others))
        for name, recorded in manifest["files"].items():
            if name not in present:
                raise DamagedCheckpoint(f"{root / name}: missing")
            if _digest(root / name) != recorded:
                raise DamagedCheckpoint(f"{root / name}: its content has changed")
        return manifest

    def check_params(self, step: int, target: Any) -> None:
        """Verifies a step and compares its parameters with the abstract `target`; loads nothing.

        Raises:
            DamagedCheckpoint: see `verify`.
            InputError: a file cannot be read, or a name, shape or dtype differs.
        """
        self.verify(step)
        self._compare(step, "params", target)

    def restore_params(self, step: int, target: Any) -> Any:
        """Verifies a step and loads its parameters into the abstract `target`."""
        self.verify(step)
        return self._load(step, params=target)["params"]

    def _scored(self) -> list[tuple[float, int]]:
        """(validation loss, step) of every checkpoint with a finite loss."""
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
        if not os.path.lexists(self.directory):
            return []
        try:
            found = [self.directory / name for name in os.listdir(self.directory)]
            return [path for path in found if re.fullmatch(pattern, path.name) and path.is_dir()]
        except _ABSENT:
            got = "a broken link" if self.directory.is_symlink() else "a file"
            raise InputError(str(self.directory), got, "a directory") from None
        except OSError as error:
            raise _unreadable(self.directory, error) from None

    def _load(self, step: int, **targets: Any) -> Any:
        try:
            for name, target in targets.items():
                self._compare(step, name, target)
            return storage.read(self.path(step), targets)
        except Exception as error:
            if found := storage.os_error(error):
                raise _unreadable(Path(found.filename or self.path(step)), found) from error
            raise

    def _compare(self, step: int, name: str, target: Any) -> None:
        """Checks names, shapes and dtypes against the target before allocating arrays."""
        if difference := storage.difference(self.path(step) / name, target):
            raise InputError(
                str(self.path(step) / name),
                difference,
                "the arrays of the configured model and optimizer",
                "the configuration of the run, or another `workdir`",
            )


def file_names(root: Path) -> list[str]:
    """Relative paths of all files of a checkpoint except its manifest.

    Raises:
        OSError: a directory cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    paths = (Path(place, n) for place, _, names in os.walk(root, onerror=fail) for n in names)
    found = (path.relative_to(root).as_posix() for path in paths if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def _digest(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except _ABSENT as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    """An error for what cannot be read at the moment; its content may well be whole."""
    hint = "again once it can be read (it was left unchanged)"
    expected = "a file or directory that can be read"
    return InputError(str(path), error.strerror or str(error), expected, hint)
