"""Server processes for tests: started, found by their log line, and always ended."""

import contextlib
import queue
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds until something that has to happen counts as not happening


class Served:
    """A server process.

    Attributes:
        url: where it answers.
        lines: what it has logged so far.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self.process, self.url = process, ""
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line.rstrip("\n"))
            self._new.put(self.lines[-1])
        self._new.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first new line that matches."""
        while (line := self._new.get(timeout=PATIENCE)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"ended with {self.process.wait()} before {pattern}: {self.lines}")

    def end(self) -> tuple[int, list[str]]:
        """Waits for the end; returns the exit code and the log."""
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code, self.lines


@contextlib.contextmanager
def serving(command: Sequence[str], env: dict[str, str]) -> Iterator[Served]:
    """Starts a server, waits until it answers, and kills it at the end if it still runs."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    served = Served(process)
    try:
        served.url = served.wait_for(r"^serving (http://127\.0\.0\.1:\d+)$")[1]
        yield served
    finally:
        process.kill()
        served.end()
        for stream in (process.stdin, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
