"""Trackers besides the run's own log (`train.trackers`): the check before training, and W&B.

Weights & Biases runs in a process of its own, so that it can neither end nor slow the training.
"""

import importlib.util
import json
import logging
import os
import secrets
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sheepop_jax.errors import InputError

log = logging.getLogger(__name__)

# -P: the script's directory, whose names hide those of the standard library, is not searched.
_PROGRAM = [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py"))]
_CHECK_SECONDS = 60
_CLOSE_SECONDS = 20  # for the last lines; the process then ends by itself
_MAX_BEHIND = 1 << 20  # bytes that wait for the process before it is turned off


def check_trackers(trackers: tuple[str, ...]) -> None:
    """Checks that Weights & Biases, if chosen, is installed and logged in.

    Raises:
        InputError: it is not.
    """
    if "wandb" not in trackers:
        return
    package = importlib.util.find_spec("wandb")
    # W&B keeps its files in ./wandb: without the package, Python takes that for a namespace.
    if package is None or package.origin is None:
        rule = "a tracker that is installed"
        raise InputError("train.trackers", "wandb", rule, "'pip install wandb'")
    try:
        code = subprocess.run(
            [*_PROGRAM, "--check"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_CHECK_SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        log.warning("Weights & Biases: login not checked (no answer in %d s)", _CHECK_SECONDS)
        return
    if code:
        rule = "a login to Weights & Biases"
        raise InputError("train.trackers", "wandb", rule, "'wandb login', or WANDB_MODE=offline")


class Wandb:
    """A run in Weights & Biases; a failure turns it off with a warning."""

    def __init__(self, directory: Path, config: dict[str, Any]):
        """Starts the process; a resumed run continues its W&B run.

        Args:
            directory: the run directory; W&B keeps its files in `wandb/` there.
            config: the configuration, as nested plain values.
        """
        self._directory = directory / "wandb"
        self._process: subprocess.Popen[bytes] | None = None
        self._behind = b""  # lines that the pipe has no room for
        try:
            self._directory.mkdir(exist_ok=True)
            name = self._directory / "run_id"
            if not name.exists():
                name.write_text(secrets.token_hex(4))
            about = {
                "id": name.read_text(),
                "name": directory.absolute().name,
                "dir": str(directory.absolute()),
                "config": config,
            }
            with (self._directory / "process.log").open("ab") as output:
                # A session of its own: Ctrl-C and the end of the training do not reach it.
                self._process = subprocess.Popen(
                    _PROGRAM,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            self._turn_off(error.strerror)
            return
        os.set_blocking(self._pipe, False)
        self.log(about)

    @property
    def _pipe(self) -> int:
        return self._process.stdin.fileno() if self._process and self._process.stdin else -1

    def log(self, values: dict[str, Any]) -> None:
        """Sends values, `step` among them; never blocks."""
        if self._process is not None:
            self._behind += json.dumps(values).encode() + b"\n"
            self._write()

    def close(self) -> None:
        """Ends the run, and waits for the last lines to be sent, but not for long."""
        until = time.monotonic() + _CLOSE_SECONDS
        while self._behind and self._process and time.monotonic() < until:
            select.select([], [self._pipe], [], 1)
            self._write()
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        try:
            if self._process.wait(max(until - time.monotonic(), 0)):
                self._turn_off("it failed")
        except subprocess.TimeoutExpired:
            log.info("Weights & Biases is still sending metrics (process %d)", self._process.pid)

    def _write(self) -> None:
        try:
            while self._behind:
                self._behind = self._behind[os.write(self._pipe, self._behind) :]
        except BlockingIOError:
            if len(self._behind) > _MAX_BEHIND:
                self._turn_off("it cannot keep up")
        except OSError:
            self._turn_off("it failed")

    def _turn_off(self, reason: str | None) -> None:
        output = self._directory / "process.log"
        log.warning("Weights & Biases turned off: %s; see %s", reason, output)
        process, self._process, self._behind = self._process, None, b""
        if process and process.stdin:
            process.stdin.close()
            process.poll()
