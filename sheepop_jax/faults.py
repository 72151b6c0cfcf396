"""Fault injection: named points at which tests kill the process or inspect its files.

SHEEPOP_JAX_FAULT=NAME kills the process when it first reaches the point NAME, NAME:K the K-th time.
The exit code is 137, as after `kill -9`: nothing is flushed, no handler runs.

A test in the same process sets `observer`, called at every point with its name and `before`. It
can copy the files, which are those that a kill at the point would leave.
"""

import os
import threading
import time
from collections.abc import Callable

_NAME, _, _nth = os.environ.get("SHEEPOP_JAX_FAULT", "").partition(":")
_left = int(_nth) if _nth.isdecimal() else 1  # passes until the kill

observer: Callable[[str, Callable[[], object]], None] | None = None


def fault_point(name: str, before: Callable[[], object] = lambda: None) -> None:
    """Kills the process here if requested, after calling `before`."""
    if name == _NAME and _is_the_one():
        before()
        _die()
    if observer is not None:
        observer(name, before)


def fault_during(name: str, begun: Callable[[], bool]) -> None:
    """Kills the process during the following operation, once `begun` returns True."""
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
