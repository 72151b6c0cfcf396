"""Contenders for the same work, each a process of its own, taking turns: A B A B.

A contender prepares its work, says that it is ready, and then does it once for every line that it
reads. So the others wait while one works, all of them see the same minutes of the machine, and the
peak memory of each is its own.
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
STARTED = "CONTENDER_STARTED"  # in a contender's environment: when it was started, time.time()


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name: as the table shows it.
        module: a file of `benchmarks/lib` that calls `serve`.
        words: its arguments.
        python: the interpreter that has its libraries.
        about: what it said when it was ready, and its peak memory in MB after the end.
        seconds: of each turn.
    """

    name: str
    module: str
    words: Sequence[str] = ()
    python: str = sys.executable
    about: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a turn."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """Shortest and longest turn, in ms."""
        return f"{1e3 * min(self.seconds):.4g}–{1e3 * max(self.seconds):.4g}"


def take_turns(
    contenders: Sequence[Contender], turns: int, within: float | None = None
) -> list[Contender]:
    """Lets each do its work `turns` times in rotation, after one turn that does not count.

    Args:
        contenders: the first has to be able to start.
        turns: that count.
        within: seconds. Whoever is not ready by then is left out, and no turn begins later but the
            first that counts.

    Returns:
        Those that could start; that another could not is told on stderr.
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
            said = _hear(process, ends)
            if said is not None:
                contender.about |= said
                able.append((contender, process))
                say(f"{contender.name}: ready ({said})")
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
            say(f"turn {turn} of {turns}")
        for contender, process in able:
            process.stdin.close()
            contender.about |= _hear(process) or {}
    finally:
        for process in running:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # what it was told and did not read
                    pipe.close()
    return [contender for contender, _ in able if contender.seconds]


def serve(prepare: Callable[[], tuple[Callable[[], Any], dict[str, Any]]]) -> None:
    """A contender's side: prepares, then works once for every line on stdin, and times that.

    Args:
        prepare: returns the work, which waits for its own result and returns what JSON can hold,
            and what there is to say about it.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    work, about = prepare()
    print(json.dumps(about), file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "result": result}), file=answers, flush=True)
    print(json.dumps({"peak_MB": round(_peak_megabytes())}), file=answers, flush=True)


def first_tokens(write: Callable[[int], Any], new_tokens: int) -> dict[str, float]:
    """Times `write(n)`, which writes n tokens, for one token: cold, then warm.

    Cold counts from when this contender was started: interpreter, imports and compiling included.
    What `new_tokens` compiles is compiled afterwards.
    """
    write(1)
    cold = time.time() - float(os.environ[STARTED])
    write(new_tokens)
    begin = time.perf_counter()
    write(1)
    warm = time.perf_counter() - begin
    return {"first_cold_s": round(cold, 2), "first_warm_ms": round(1e3 * warm, 1)}


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _peak_megabytes() -> float:
    """Resident, of this process alone: `ru_maxrss` would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _hear(process: subprocess.Popen[str], ends: float | None = None) -> dict[str, Any] | None:
    """The next line of what it says; None if it ends, or says nothing until then."""
    left = None if ends is None else max(ends - time.monotonic(), 0)
    heard, _, _ = select.select([process.stdout], [], [], left)
    line = process.stdout.readline() if heard else ""
    return json.loads(line) if line else None
