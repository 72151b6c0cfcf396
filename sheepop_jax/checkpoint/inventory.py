"""Lists and deletes the checkpoints of a run (the `checkpoints` command)."""

import contextlib
import os
import stat
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sheepop_jax.checkpoint.checkpoints import BEST_METRIC, REASON, Checkpoints, DamagedCheckpoint
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.errors import InputError


@dataclass(frozen=True)
class Item:
    """One checkpoint, damaged or not.

    Attributes:
        path: its directory.
        step: its step.
        bytes: size of all its files.
        figures: its metrics, e.g. `val_loss`; empty if unreadable.
        is_latest: whether training resumes from it.
        is_best: whether it has the lowest validation loss.
        quarantined: whether it was renamed as damaged; never loaded.
        damage: why it cannot be loaded; "" if no damage is known.
    """

    path: Path
    step: int
    bytes: int
    figures: dict[str, Any]
    is_latest: bool = False
    is_best: bool = False
    quarantined: bool = False
    damage: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as printed by `checkpoints --json`."""
        fields = asdict(self) | {"path": str(self.path)}
        return {{"quarantined": "set_aside"}.get(name, name): fields[name] for name in fields}


def table(items: list[Item], verified: bool) -> str:
    """Formats one line per checkpoint; `verified`: whether `inventory` verified the files."""
    if not items:
        return "no checkpoints"
    lines = [f"{'step':>8}{'MB':>10}{'val_loss':>10}  state"]
    for item in items:
        loss = item.figures.get(BEST_METRIC)
        marks = [
            mark for mark, is_so in (("latest", item.is_latest), ("best", item.is_best)) if is_so
        ]
        if item.quarantined:
            marks.append(f"quarantined as {item.path.name}: {item.damage}")
        elif item.damage:
            marks.append(f"DAMAGED: {item.damage}")
        elif verified:
            marks.append("verified")
        shown = "-" if loss is None else f"{loss:.4f}"
        lines.append(f"{item.step:>8}{item.bytes / 1e6:>10.1f}{shown:>10}  {', '.join(marks)}")
    return "\n".join(line.rstrip() for line in lines)


def inventory(checkpoints: Checkpoints, verify: bool = False) -> list[Item]:
    """All checkpoints by step, then the quarantined ones.

    With `verify`, every file is verified; otherwise only manifests are read.
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
            damage = "no reason recorded"
        items.append(Item(path, step, _bytes(path), {}, quarantined=True, damage=damage))
    return items


def delete(checkpoints: CheckpointSaver, steps: Collection[int]) -> list[int]:
    """Deletes these steps and returns them in order.

    Raises:
        InputError: a step does not exist, or no valid checkpoint would remain; nothing is deleted.
    """
    present = checkpoints.steps()
    for step in steps:
        if step not in present:
            raise InputError("delete", step, f"existing steps ({_listed(present)})")
    _require_a_whole_one(checkpoints, set(present) - set(steps), "delete", steps)
    doomed = sorted(set(steps))
    for step in doomed:
        checkpoints.delete(step)
    return doomed


def keep_only(checkpoints: CheckpointSaver, steps: Collection[int]) -> list[int]:
    """Deletes all steps except these, and returns the deleted ones.

    Raises:
        InputError: a step does not exist, or none of these is valid; nothing is deleted.
    """
    present = checkpoints.steps()
    for step in steps:
        if step not in present:
            raise InputError("keep", step, f"existing steps ({_listed(present)})")
    _require_a_whole_one(checkpoints, set(steps), "keep", steps)
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
    hint = f"rm -r {checkpoints.directory} to start over"
    raise InputError(flag, _listed(sorted(steps)), "at least one valid checkpoint left", hint)


def _listed(steps: Collection[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _bytes(root: Path) -> int:
    total = 0
    for directory, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a running training may prune it
                found = os.lstat(os.path.join(directory, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total
