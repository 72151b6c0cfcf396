"""The metrics of a run: `metrics.jsonl`, one object per line, and the trackers (TensorBoard, W&B).

TensorBoard shows training and validation as two runs, so that both losses are in one chart.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import socket
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar, text

from sheepop_jax.config.schema import Config
from sheepop_jax.faults import fault_point
from sheepop_jax.files import write_atomic
from sheepop_jax.training.trackers import Wandb

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends lines to `metrics.jsonl`. Every line has `step`; non-finite numbers are null."""

    def __init__(
        self, directory: Path, first_step: int, evaluated: bool = True, config: Config | None = None
    ):
        """Opens the log of a run that resumes after `first_step`, and drops later lines.

        The trackers are those of `config`; without one, TensorBoard.

        An interrupted run may have logged steps after its last checkpoint. They run again, and each
        step must appear once; so must the evaluation of `first_step`, unless already `evaluated`.
        """
        self._path = directory / NAME
        lines = [
            line
            for line in read_metrics(directory)
            if line["step"] < first_step + (evaluated or "val_loss" not in line)
        ]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self._path.open("a")
        trackers = config.train.tracker_names if config else ("tensorboard",)
        self._events = {
            kind: _Events(directory / "tensorboard" / kind, first_step)
            for kind in ("train", "val")
            if "tensorboard" in trackers
        }
        self._wandb = None
        if config and "wandb" in trackers:
            self._wandb = Wandb(directory, config.to_dict())

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line to the log and each number to the trackers."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        kind = "val" if "val_loss" in values else "train"
        if kind == "val":
            fault_point("evaluation")
        line = json.dumps({"step": step, **finite}) + "\n"
        self._file.write(line[:9])
        fault_point("log-append", before=self._file.flush)
        self._file.write(line[9:])
        named = {key.removeprefix("val_"): value for key, value in finite.items()}
        for key, value in named.items():
            if isinstance(value, int | float) and self._events:
                self._events[kind].add(scalar(key, value), step)
        if self._wandb:
            self._wandb.log({"step": step, **{f"{kind}/{key}": v for key, v in named.items()}})

    def write_sample(self, step: int, sample: str) -> None:
        """Sends a sample text to the trackers."""
        if self._events:  # indented, since TensorBoard shows Markdown
            self._events["val"].add(text("sample", textwrap.indent(sample, "    ")), step)
        if self._wandb:
            self._wandb.log({"step": step, "sample": sample})

    def flush(self) -> None:
        """Flushes to the operating system.

        Raises:
            OSError: the log cannot be written; names the file and the free space.
        """
        try:
            self._file.flush()
        except OSError as error:
            free = shutil.disk_usage(self._path.parent).free / 1e6
            what = f"{error.strerror}; {free:,.0f} MB free; checkpoints are intact"
            raise OSError(error.errno, what, str(self._path)) from None
        for events in self._events.values():
            events.flush()

    def close(self) -> None:
        """Flushes and closes both files; write errors are only logged, to not mask others."""
        try:
            self._file.close()
        except OSError as error:
            log.warning("%s: last lines not written (%s)", self._path, error.strerror)
        for events in self._events.values():
            events.close()
        if self._wandb:
            self._wandb.close()


class _Events:
    """TensorBoard's event file. A write error disables it instead of ending the run.

    Not `SummaryWriter`: after a write error in its thread, later calls block forever.
    """

    def __init__(self, directory: Path, first_step: int):
        self._directory = directory
        self._file: RecordWriter | None = None
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        with self._giving_up():
            directory.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(directory / name))
        self._write(file_version="brain.Event:2")
        # SessionLog.START makes TensorBoard drop older events from this step on.
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Summary, step: int) -> None:
        self._write(step=step, summary=summary)

    def flush(self) -> None:
        if self._file:
            with self._giving_up():
                self._file.flush()

    def close(self) -> None:
        if self._file:
            with self._giving_up():
                self._file.close()

    def _write(self, **fields: Any) -> None:
        if self._file:
            with self._giving_up():
                self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s: TensorBoard logging disabled (%s)", self._directory, error.strerror)
            file, self._file = self._file, None
            if file:
                with contextlib.suppress(OSError):
                    file.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Reads all complete lines of a run's log; skips a line truncated by a kill."""
    path = directory / NAME
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines
