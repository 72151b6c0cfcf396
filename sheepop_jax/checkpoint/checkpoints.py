"""Checkpoints of a run: committed atomically, verified before loading.

One directory per step, committed by a single rename:

    checkpoints/00000500/params/         the model's parameters (orbax)
                         optimizer/      step counters and the optimizer state (orbax)
                         manifest.json   written last: step, figures, SHA-256 of every file

A step directory without a manifest is damaged. Names that begin with `.pending-` or `.deleted-`
are unfinished saves or deletions; the next save or resume removes them.
"""

import logging
import math
import re
from pathlib import Path
from typing import Any

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


class DamagedCheckpoint(Exception):
    """A checkpoint file is missing, added or changed; the message names it."""


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
        """
        path = self.path(step) / MANIFEST
        try:
            manifest = read_sealed(path)
            if manifest["step"] != step:
                raise DamagedCheckpoint(f"{path}: step {manifest['step']}, not {step}")
            if manifest["format"] != FORMAT:
                raise DamagedCheckpoint(f"{path}: format {manifest['format']}, not {FORMAT}")
            return manifest
        except (OSError, ValueError, KeyError) as error:
            raise DamagedCheckpoint(f"{path}: {error}") from None

    def resolve(self, step: str | int | None = None) -> int:
        """Resolves "latest", "best" or a number to a committed step.

        None is the best among the checkpoints whose manifest is valid, or the latest if none was
        evaluated.

        Raises:
            InputError: no such step; the message lists the available ones.
        """
        steps = self.steps()
        if not steps:
            raise InputError(str(self.directory), "no checkpoint", "at least one", "training first")
        best = self.best()
        if step is None:
            self._warn_of_damaged_manifests()
            return steps[-1] if best is None else best
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

    def _warn_of_damaged_manifests(self) -> None:
        for step in self.steps():
            try:
                self.manifest(step)
            except DamagedCheckpoint as damage:
                log.warning("step %d is damaged and may have been the best (%s)", step, damage)

    def verify(self, step: int) -> dict[str, Any]:
        """Compares every file with the manifest and returns the manifest.

        Opens only files found in the directory: paths in a forged manifest are not followed.

        Raises:
            DamagedCheckpoint: a file is missing, added or changed; names the first one.
        """
        root, manifest = self.path(step), self.manifest(step)
        present = file_names(root)
        for name in present:
            if name not in manifest["files"]:
                raise DamagedCheckpoint(f"{root / name}: not in the manifest")
        for name, recorded in manifest["files"].items():
            if name not in present:
                raise DamagedCheckpoint(f"{root / name}: missing")
            if _digest(root / name) != recorded:
                raise DamagedCheckpoint(f"{root / name}: its content has changed")
        return manifest

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
        if not self.directory.is_dir():
            return []
        return [p for p in self.directory.iterdir() if re.fullmatch(pattern, p.name) and p.is_dir()]

    def _load(self, step: int, **targets: Any) -> Any:
        for name, target in targets.items():
            self._compare(step, name, target)
        return storage.read(self.path(step), targets)

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
    """Relative paths of all files of a checkpoint except its manifest."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _digest(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:  # e.g. a disk read error
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from None
