"""The numbers of a run: `metrics.jsonl`, one object a line, and TensorBoard's event files."""

import json
import math
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends lines; every line has `step`, and non-finite numbers are null."""

    def __init__(self, directory: Path, first_step: int):
        """Opens the log of a run that goes on after `first_step`; later lines are cut away.

        An interrupted run may have logged steps after its last checkpoint. They are computed again,
        and each step must stand once.
        """
        self._path = directory / NAME
        lines = [line for line in read_metrics(directory) if line["step"] <= first_step]
        cut = self._path.with_suffix(".cut")
        cut.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(cut, self._path)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds one line to the log, and each number to TensorBoard."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        kind = "held_out" if "val_loss" in values else "train"
        for key, value in finite.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{key}", value, step)

    def flush(self) -> None:
        """Hands everything written to the operating system."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's log; a last line torn by a kill is left out."""
    path = directory / NAME
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines
