"""Interleaved benchmarks: contenders in separate processes take turns (A B A B).

A contender prepares its work, reports that it is ready, and performs the work once per line on
stdin while the others wait. Load on the machine therefore affects all contenders, and peak memory
is measured per process.
"""

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
STARTED = "CONTENDER_STARTED"  # environment variable of a contender: its start as time.time()


@dataclass
class Contender:
    """One implementation of the work.

    Attributes:
        name: name in the table.
        module: module of `benchmarks/lib` that calls `serve`.
        words: command-line arguments.
        python: Python interpreter with the required libraries.
        about: facts reported when ready, and the peak memory in MB (`peak_MB`) at the end.
        seconds: duration of each timed turn.
        results: what the work returned in each timed turn.
    """

    name: str
    module: str
    words: Sequence[str] = ()
    python: str = sys.executable
    about: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds per turn."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """Shortest and longest turn in ms, as text."""
        return f"{1e3 * min(self.seconds):.4g}–{1e3 * max(self.seconds):.4g}"


def take_turns(
    contenders: Sequence[Contender], turns: int, within: float | None = None
) -> list[Contender]:
    """Runs `turns` timed turns of each contender in rotation, after one warmup turn.

    Args:
        contenders: the contenders; the first one is required to start.
        turns: number of timed turns.
        within: time limit in seconds. Contenders that are not ready by then are left out, and no
            further turn begins, except the first timed one.

    Returns:
        The contenders that started; the others are reported on stderr.

    Raises:
        SystemExit: the first contender could not start.
    """
    ends = None if within is None else time.monotonic() + within
    running: list[subprocess.Popen[str]] = []
    able: list[tuple[Contender, subprocess.Popen[str]]] = []
    try:
        for contender in contenders:
            process = subprocess.Popen(
                [contender.python, "-m", f"benchmarks.lib.{contender.module}", *contender.words],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), STARTED: str(time.time())},
            )
            running.append(process)
            reported = _hear(process, ends)
            if reported is not None:
                contender.about |= reported
                able.append((contender, process))
                say(f"{contender.name}: ready ({reported})")
            elif contender is contenders[0]:
                raise SystemExit(f"{contender.name} could not start")
            else:
                say(f"{contender.name}: left out, it could not start, or not in time")
        for turn in range(turns + 1):
            if turn > 1 and ends is not None and time.monotonic() > ends:
                say(f"no time for more than {turn - 1} of {turns} turns")
                break
            for contender, process in able:
                print("go", file=process.stdin, flush=True)
                heard = _hear(process)
                if turn and heard:
                    contender.seconds.append(heard["seconds"])
                    contender.results.append(heard.get("result"))
            say(f"turn {turn} of {turns}")
        for contender, process in able:
            process.stdin.close()
            contender.about |= _hear(process) or {}
    finally:
        for process in running:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # unread input
                    pipe.close()
    return [contender for contender, _ in able if contender.seconds]


def serve(prepare: Callable[[], tuple[Callable[[], Any], dict[str, Any]]]) -> None:
    """Runs a contender: prepares, then performs and times the work once per line on stdin.

    Args:
        prepare: returns the work and facts about it. The work must block until its result is ready
            and return a value that JSON can encode.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirect the output of libraries to stderr
    work, about = prepare()
    print(json.dumps(about), file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "result": result}), file=answers, flush=True)
    print(json.dumps({"peak_MB": round(_peak_megabytes())}), file=answers, flush=True)


def first_tokens(write: Callable[[int], Any], new_tokens: int) -> dict[str, float]:
    """Times the generation of one token by `write(1)`: cold, then warm.

    The cold time starts with the process and includes imports and compilation. `write(new_tokens)`
    is compiled afterwards.
    """
    write(1)
    cold = time.time() - float(os.environ[STARTED])
    write(new_tokens)
    begin = time.perf_counter()
    write(1)
    warm = time.perf_counter() - begin
    return {"first_cold_s": round(cold, 2), "first_warm_ms": round(1e3 * warm, 1)}


def say(line: str) -> None:
    """Prints a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def _peak_megabytes() -> float:
    """Peak resident size of this process; `ru_maxrss` would start at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _hear(process: subprocess.Popen[str], ends: float | None = None) -> dict[str, Any] | None:
    """Reads the next line of a contender's output; None if it exits, or is silent until `ends`."""
    left = None if ends is None else max(ends - time.monotonic(), 0)
    heard, _, _ = select.select([process.stdout], [], [], left)
    line = process.stdout.readline() if heard else ""
    return json.loads(line) if line else None
