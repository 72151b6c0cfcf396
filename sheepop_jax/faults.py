"""Named points at which a test kills the process, or looks at what a kill would leave.

SHEEPOP_JAX_FAULT=NAME kills at the first passing of a point, NAME:K at the K-th. Exit code 137 is
what a shell reports of `kill -9`: nothing is flushed, no handler runs.

A test in the same process sets `observer`. It is called at every passing with the point's name and
with `before`, and can copy the files: a kill at the point would leave the same files.
"""

import os
import threading
import time
from collections.abc import Callable

_NAME, _, _nth = os.environ.get("SHEEPOP_JAX_FAULT", "").partition(":")
_left = int(_nth) if _nth.isdecimal() else 1  # passings until death

observer: Callable[[str, Callable[[], object]], None] | None = None


def fault_point(name: str, before: Callable[[], object] = lambda: None) -> None:
    """Dies here if it was asked for; `before` is called first."""
    if name == _NAME and _is_the_one():
        before()
        _die()
    if observer is not None:
        observer(name, before)


def fault_during(name: str, begun: Callable[[], bool]) -> None:
    """Dies in the middle of what comes next, as soon as `begun` says that it has begun."""
    if name == _NAME and _is_the_one():
        threading.Thread(target=_die_when, args=(begun,), daemon=True).start()


def _is_the_one() -> bool:
    global _left
    _left -= 1
    return _left == 0


def _die_when(begun: Callable[[], bool]) -> None:
    while not begun():
        time.sleep(0.0002)
    _die()


def _die() -> None:
    os._exit(137)
