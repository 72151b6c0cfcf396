"""Arrays in a directory, by orbax; the only file that knows it."""

import contextlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

# How long a process waits for the others, which may have much more to write.
_BARRIER_SECONDS = 3600

log = logging.getLogger(__name__)


def write(directory: Path, items: dict[str, Any]) -> None:
    """Writes each item, a tree of arrays, into a directory of its name.

    Among several processes each writes what its devices hold, and all have to call this.
    """
    _hush_orbax()
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    with _checkpointer() as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.Composite(**args))


def wait_for_all(what: str) -> None:
    """Returns once all processes have come to the same point; from any thread."""
    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=what, timeout_ms=1000 * _BARRIER_SECONDS)


def has_begun(directory: Path) -> bool:
    """Whether an unfinished `write` has written arrays."""
    return any(p.is_file() for p in directory.parent.glob(f"{directory.name}*/**/d/*"))


def read(directory: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Reads items into the shapes, dtypes and shardings of abstract targets."""
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    with _checkpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), args=ocp.args.Composite(**args))


def _checkpointer() -> ocp.Checkpointer:
    """With the processes named, orbax lets them meet by messages from whichever thread saves.

    Else it does so by a computation on the devices, in the midst of those of the training step.
    """
    several = set(range(jax.process_count())) if jax.process_count() > 1 else None
    among = ocp.options.MultiprocessingOptions(active_processes=several)
    options = ocp.CompositeOptions(multiprocessing_options=among)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=among)


def describe(item: Path) -> Any:
    """The tree of an item, with a shape and a dtype for each array; reads no arrays."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.metadata(item.absolute()).tree


def difference(item: Path, target: Any) -> str:
    """How an item differs from a target in names, shapes and dtypes; "" where it does not.

    Nothing large is allocated for a model that does not fit.
    """
    saved, wanted = _arrays(describe(item)), _arrays(target)
    both = [name for name in saved if name in wanted and saved[name] != wanted[name]]
    changed = [f"{name} {saved[name]}, not {wanted[name]}" for name in both]
    more = [f"{name}, which this model does not have" for name in saved if name not in wanted]
    fewer = [f"no {name}" for name in wanted if name not in saved]
    return few(changed + more + fewer)


def name_of(path: tuple[Any, ...]) -> str:
    """A namedtuple's fields, a dictionary's keys and a list's numbers, written alike."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def few(found: list[str]) -> str:
    """The first of many."""
    return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


def _arrays(tree: Any) -> dict[str, str]:
    """Name → dtype and shape, e.g. `block_0.attention.key.kernel`: `float32[24, 24]`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): f"{jnp.dtype(x.dtype)}{list(x.shape)}" for path, x in leaves}


def _hush_orbax() -> None:
    """Leaves what is said of a failed save to us: one line. With --debug nothing is kept back.

    The threads that write log a traceback each, tensorstore prints another when it wants to tell a
    loop that has given up meanwhile, and writes that never began are warned of as never awaited.
    """
    absl = logging.getLogger("absl")
    if log.isEnabledFor(logging.DEBUG) or _from_elsewhere in absl.filters:
        return
    absl.addFilter(_from_elsewhere)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return "_SignalingThread" not in record.getMessage()
