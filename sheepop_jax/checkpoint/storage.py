"""Reads and writes arrays with orbax; the only module that imports it."""

import contextlib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

# Barrier timeout; other processes may have much more to write.
_BARRIER_SECONDS = 3600
# What is left of other arrays when one fails; that one is raised.
_ASIDE = ("Event loop is closed", "Encountered error while reading array index")

log = logging.getLogger(__name__)


def write(directory: Path, items: dict[str, Any], bytes_at_once: int | None = None) -> None:
    """Writes each item, a pytree of arrays, to a subdirectory of its name.

    With several processes, each writes its addressable shards, and all must call this.

    Args:
        directory: the directory; must not exist.
        items: pytrees of `jax.Array`s. NumPy arrays would be copied, all at once.
        bytes_at_once: size of the arrays that are copied at a time; more than the largest. None is
            no limit.
    """
    _hush_orbax()
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    limits = dict.fromkeys(items, bytes_at_once) if bytes_at_once else None
    with _checkpointer(limits) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.Composite(**args))


def wait_for_all(what: str, timeout_seconds: int = _BARRIER_SECONDS) -> None:
    """A barrier named `what` across all processes; callable from any thread.

    Raises:
        RuntimeError: a process died, or the barrier timed out.
    """
    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=what, timeout_ms=1000 * timeout_seconds)


def has_begun(directory: Path) -> bool:
    """Whether an unfinished `write` has written any array."""
    return any(p.is_file() for p in directory.parent.glob(f"{directory.name}*/**/d/*"))


def read(directory: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Reads items with the shapes, dtypes and shardings of abstract targets."""
    _hush_orbax()
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    with _checkpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), args=ocp.args.Composite(**args))


def os_error(error: Exception) -> OSError | None:
    """The operating system's error behind a failed `read` or `describe`; None if it is another.

    tensorstore raises ValueError with the number and the file in its message.
    """
    if isinstance(error, OSError):
        return error
    said = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    if said is None and not str(error).startswith("NOT_FOUND: "):
        return None
    number = int(said[1]) if said else errno.ENOENT
    names = re.findall(r'local file "([^"]*)"', str(error))
    return OSError(number, os.strerror(number), names[-1] if names else None)


def _checkpointer(limits: Mapping[str, int] | None = None) -> ocp.Checkpointer:
    """A checkpointer whose barriers are host messages, usable from the saving thread.

    Without `active_processes`, orbax synchronizes by a device computation, which would interleave
    with those of the training step.
    """
    several = set(range(jax.process_count())) if jax.process_count() > 1 else None
    among = ocp.options.MultiprocessingOptions(active_processes=several)
    options = ocp.CompositeOptions(multiprocessing_options=among)
    handlers = {
        name: ocp.StandardCheckpointHandler(
            save_concurrent_gb=limit / 1e9, multiprocessing_options=among
        )
        for name, limit in (limits or {}).items()
    }
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
    return ocp.Checkpointer(handler, multiprocessing_options=among)


def describe(item: Path) -> Any:
    """The pytree of an item with shapes and dtypes; reads no arrays."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.metadata(item.absolute()).tree


def difference(item: Path, target: Any) -> str:
    """Differences in names, shapes and dtypes between an item and a target; "" if none.

    Allocates no arrays.
    """
    saved, wanted = _arrays(describe(item)), _arrays(target)
    both = [name for name in saved if name in wanted and saved[name] != wanted[name]]
    changed = [f"{name} {saved[name]}, not {wanted[name]}" for name in both]
    more = [f"unexpected {name}" for name in saved if name not in wanted]
    fewer = [f"missing {name}" for name in wanted if name not in saved]
    return few(changed + more + fewer)


def name_of(path: tuple[Any, ...]) -> str:
    """A key path as dotted names, the same for namedtuples, dictionaries and lists."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def few(found: list[str]) -> str:
    """Joins the first four entries, and counts the rest."""
    return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


def _arrays(tree: Any) -> dict[str, str]:
    """Name → dtype and shape, e.g. `block_0.attention.key.kernel`: `float32[24, 24]`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): f"{jnp.dtype(x.dtype)}{list(x.shape)}" for path, x in leaves}


def _hush_orbax() -> None:
    """Silences orbax's output on a failed save or read, which is one line; not with --debug.

    Otherwise each writer thread logs a traceback, tensorstore prints another when it notifies an
    event loop that has already closed, writes never started warn about unawaited coroutines, and
    so do reads that are given up, as of a checkpoint that is deleted meanwhile.
    """
    absl = logging.getLogger("absl")
    if log.isEnabledFor(logging.DEBUG) or _from_elsewhere in absl.filters:
        return
    absl.addFilter(_from_elsewhere)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(_ASIDE):
            others(unraisable)

    sys.unraisablehook = hook


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return "_SignalingThread" not in record.getMessage()
