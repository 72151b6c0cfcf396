"""What checkpoints a run has, for a person; and deleting some of them."""

import contextlib
import os
import stat
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sheepop_jax.checkpoint.checkpoints import BEST_METRIC, REASON, Checkpoints
from sheepop_jax.checkpoint.manifest import DamagedCheckpoint
from sheepop_jax.errors import InputError


@dataclass(frozen=True)
class Item:
    """One checkpoint, or what is left of one.

    Attributes:
        path: its directory.
        step: its number.
        bytes: of all its files.
        figures: recorded with it, e.g. `val_loss`; empty where they cannot be read.
        is_latest: the one that training goes on from.
        is_best: the one with the lowest validation loss.
        quarantine: moved out of the way as damaged; never loaded.
        damage: why it cannot be loaded; empty where nothing is known against it.
    """

    path: Path
    step: int
    bytes: int
    figures: dict[str, Any]
    is_latest: bool = False
    is_best: bool = False
    quarantine: bool = False
    damage: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `checkpoints --json` prints them."""
        return asdict(self) | {"path": str(self.path)}


def table(items: list[Item], verified: bool) -> str:
    """A line for each; `verified`: whether the files were read."""
    if not items:
        return "no checkpoints"
    lines = [f"{'step':>8}{'MB':>10}{'val_loss':>10}  state"]
    for item in items:
        loss = item.figures.get(BEST_METRIC)
        marks = [
            mark for mark, is_so in (("latest", item.is_latest), ("best", item.is_best)) if is_so
        ]
        if item.quarantine:
            marks.append(f"set aside as {item.path.name}: {item.damage}")
        elif item.damage:
            marks.append(f"DAMAGED: {item.damage}")
        elif verified:
            marks.append("verified")
        shown = "-" if loss is None else f"{loss:.4f}"
        lines.append(f"{item.step:>8}{item.bytes / 1e6:>10.1f}{shown:>10}  {', '.join(marks)}")
    return "\n".join(line.rstrip() for line in lines)


def inventory(checkpoints: Checkpoints, verify: bool = False) -> list[Item]:
    """All checkpoints by step, then those that were set aside.

    With `verify`, every file is read and compared; otherwise only the manifests are.
    """
    steps, best = checkpoints.steps(), checkpoints.best()
    items = []
    for step in steps:
        figures, damage = {}, ""
        try:
            found = checkpoints.verify(step) if verify else checkpoints.manifest(step)
            figures = found["figures"]
        except DamagedCheckpoint as error:
            damage = str(error)
        path = checkpoints.path(step)
        items.append(
            Item(path, step, _bytes(path), figures, step == steps[-1], step == best, damage=damage)
        )
    for path, step in checkpoints.aside():
        try:
            damage = (path / REASON).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            damage = "no reason was recorded"
        items.append(Item(path, step, _bytes(path), {}, quarantine=True, damage=damage))
    return items


def delete(checkpoints: Checkpoints, steps: Collection[int]) -> list[int]:
    """Deletes these steps, and returns them in order.

    Raises:
        InputError: one of them is not there, or no whole checkpoint would be left; then none is
            deleted.
    """
    present = checkpoints.steps()
    for step in steps:
        if step not in present:
            raise InputError("--delete", step, f"some of {_listed(present)}")
    _require_a_whole_one(checkpoints, set(present) - set(steps), "--delete", steps)
    doomed = sorted(set(steps))
    for step in doomed:
        checkpoints.delete(step)
    return doomed


def keep_only(checkpoints: Checkpoints, steps: Collection[int]) -> list[int]:
    """Deletes all steps but these, and returns those deleted.

    Raises:
        InputError: one of them is not there, or none of them is whole; then none is deleted.
    """
    present = checkpoints.steps()
    for step in steps:
        if step not in present:
            raise InputError("--keep", step, f"some of {_listed(present)}")
    _require_a_whole_one(checkpoints, set(steps), "--keep", steps)
    doomed = [step for step in present if step not in steps]
    for step in doomed:
        checkpoints.delete(step)
    return doomed


def _require_a_whole_one(
    checkpoints: Checkpoints, left: set[int], flag: str, steps: Collection[int]
) -> None:
    for step in sorted(left, reverse=True):
        try:
            checkpoints.verify(step)
            return
        except DamagedCheckpoint:
            continue
    hint = f"rm -r {checkpoints.directory}, to begin again"
    raise InputError(flag, _listed(sorted(steps)), "at least one whole checkpoint left", hint)


def _listed(steps: Collection[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _bytes(root: Path) -> int:
    total = 0
    for directory, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a training beside this may be pruning it
                found = os.lstat(os.path.join(directory, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total
