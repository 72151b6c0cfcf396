"""Lists and deletes the checkpoints of a run (the `checkpoints` command)."""

import contextlib
import os
import stat
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
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

    Raises:
        InputError: a file cannot be read.
    """
    best = checkpoints.best()
    items = []
    for step in checkpoints.steps():
        path, figures, damage = checkpoints.path(step), {}, ""
        try:
            found = checkpoints.verify(step) if verify else checkpoints.manifest(step)
            figures = found["figures"]
        except (DamagedCheckpoint, InputError) as error:
            if not path.is_dir():
                continue  # a running training deleted it meanwhile
            if isinstance(error, InputError):
                raise
            damage = str(error)
        items.append(Item(path, step, _bytes(path), figures, is_best=step == best, damage=damage))
    if items:
        items[-1] = replace(items[-1], is_latest=True)
    elif checkpoints.steps():  # a running training deleted all, and saved newer ones
        return inventory(checkpoints, verify)
    for path, step in checkpoints.aside():
        try:
            damage = (path / REASON).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            damage = "no reason recorded"
        items.append(Item(path, step, _bytes(path), {}, quarantined=True, damage=damage))
    return items


def delete(checkpoints: CheckpointSaver, steps: Collection[int], force: bool = False) -> list[int]:
    """Deletes these steps and returns them in order.

    Raises:
        InputError: a step does not exist, or, without `force`, it is the best, or no valid
            checkpoint would remain; nothing is deleted.
    """
    return _delete(checkpoints, set(steps), "delete", steps, force)


def keep_only(
    checkpoints: CheckpointSaver, steps: Collection[int], force: bool = False
) -> list[int]:
    """Deletes all steps except these, and returns the deleted ones.

    Raises:
        InputError: a step does not exist, or, without `force`, none of these is valid or the best
            is not among them; nothing is deleted.
    """
    return _delete(checkpoints, set(checkpoints.steps()) - set(steps), "keep", steps, force)


def _delete(
    checkpoints: CheckpointSaver, doomed: set[int], flag: str, named: Collection[int], force: bool
) -> list[int]:
    present = checkpoints.steps()
    for step in named:
        if step not in present:
            raise InputError(flag, step, f"existing steps ({_listed(present)})")
    if not force:
        _require_a_whole_one(checkpoints, set(present) - doomed, flag, named)
        if (best := checkpoints.best()) in doomed:
            rule = "not to delete" if flag == "delete" else "to keep"
            expected = f"{rule} step {best}, the best by {BEST_METRIC}"
            raise InputError(flag, _listed(sorted(named)), expected, "`force` to delete it anyway")
    for step in sorted(doomed):
        checkpoints.delete(step)
    return sorted(doomed)


def _require_a_whole_one(
    checkpoints: Checkpoints, left: set[int], flag: str, steps: Collection[int]
) -> None:
    for step in sorted(left, reverse=True):
        try:
            checkpoints.verify(step)
            return
        except DamagedCheckpoint:
            continue
    expected, hint = "at least one valid checkpoint left", "`force` to delete it anyway"
    raise InputError(flag, _listed(sorted(steps)), expected, hint)


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
