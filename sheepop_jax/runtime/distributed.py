"""Several processes that train as one: how they find each other, decide, agree and leave.

The one place that knows of the others. A process alone pays for none of it. jax and numpy are
imported only where they are used: what jax starts with is settled before (`runtime`), and a Python
without them has to get as far as the message that says so (`cli`).
"""

import contextlib
import json
import logging
import os
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sheepop_jax.errors import InputError, RunFailed

if TYPE_CHECKING:
    from jax.sharding import Mesh

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10  # without a sign of life, until the others give up too
_SHUTDOWN_SECONDS = 60  # how far apart processes may come to their end
AUTO = "auto"
_LOOPBACK = ("localhost", "127.", "[::1]")

T = TypeVar("T")

_index, _count = 0, 1  # of this process, and how many there are; set by `join`


@dataclass(frozen=True)
class DistributedConfig:
    """Which of how many processes this is, as far as the flags say so.

    Attributes:
        coordinator_address: HOST:PORT of process 0; or "auto", what jax finds out by itself.
        num_processes: all of them.
        process_id: this one's number, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        address, count, index = self.coordinator_address, self.num_processes, self.process_id
        given = [value for value in (address, count, index) if value is not None]
        if address == AUTO and len(given) > 1:
            rule = "HOST:PORT where --num_processes and --process_id are given"
            raise InputError("--coordinator_address", address, rule)
        if address == AUTO or not given:
            return
        if address is None or count is None or index is None:
            rule = "--coordinator_address, --num_processes and --process_id together"
            raise InputError("processes", given, rule, "none of them under SLURM or Open MPI")
        if not re.fullmatch(r".+:[0-9]{1,5}", address):
            raise InputError("--coordinator_address", address, "HOST:PORT, or auto")
        if count < 1:
            raise InputError("--num_processes", count, "at least 1")
        if not 0 <= index < count:
            raise InputError("--process_id", index, f"at least 0 and below --num_processes {count}")


ALONE = DistributedConfig()


def join(member: DistributedConfig) -> None:
    """Meets the other processes; returns at once if there are none. Before jax's first device.

    Raises:
        InputError: they were not found.
    """
    address = member.coordinator_address
    if address is None and _started_by_a_launcher():
        address = _on_this_host() or AUTO
    if address is None or member.num_processes == 1:
        return
    import jax

    # jax's own notice of SIGTERM would take the signal from `StopSignal`.
    jax.config.update("jax_enable_preemption_service", False)
    # jax finds out what is None.
    found = "deactivate" if member.process_id is not None else None
    try:
        jax.distributed.initialize(
            coordinator_address=None if address == AUTO else address,
            num_processes=member.num_processes,
            process_id=member.process_id,
            cluster_detection_method=found,
            # What goes over this connection is neither encrypted nor signed: with all processes on
            # one host it must not be reached from another.
            coordinator_bind_address=address if address.startswith(_LOOPBACK) else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            "--coordinator_address", address, f"the address of process 0, which waits ({reason})"
        ) from None
    global _index, _count
    _index, _count = jax.process_index(), jax.process_count()
    _leave_stdout_to_results()
    if not (is_main_process() or log.isEnabledFor(logging.DEBUG)):
        logging.getLogger(__package__).setLevel(logging.ERROR)


def _started_by_a_launcher() -> bool:
    """Whether SLURM, Open MPI or whoever set jax's own variables has started several processes.

    On Cloud TPU and Kubernetes the environment does not show it: there, pass the flags.
    """
    env = os.environ
    in_a_step = "SLURM_STEP_NODELIST" in env  # not in a batch script itself
    counts = (env.get("SLURM_NTASKS") if in_a_step else None, env.get("OMPI_COMM_WORLD_SIZE"))
    several = any(count and count.isdecimal() and int(count) > 1 for count in counts)
    return several or "JAX_COORDINATOR_ADDRESS" in env


def _on_this_host() -> str | None:
    """A coordinator's loopback address, where the launcher put all processes on one host."""
    env = os.environ
    ranks = env.get("OMPI_COMM_WORLD_SIZE")
    if env.get("SLURM_STEP_NUM_NODES") == "1":
        job = f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
    elif ranks and ranks == env.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        job = env.get("OMPI_MCA_orte_hnp_uri") or env.get("PMIX_NAMESPACE") or ""
    else:
        return None
    return f"127.0.0.1:{61440 + zlib.crc32(job.encode()) % 4096}"  # the ports that jax takes too


def _leave_stdout_to_results() -> None:
    """Gloo and NCCL print what they do to the file descriptor of stdout: lead that to stderr."""
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w")


def count() -> int:
    """How many processes there are."""
    return _count


def index() -> int:
    """The number of this one, from 0."""
    return _index


def is_main_process() -> bool:
    """Whether this is the process that shows, logs and decides."""
    return _index == 0


def broadcast_from_main(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them; it has to be JSON's.

    Raises:
        InputError: what `work` raised in the first process, in all of them.
    """
    if _count == 1:
        return work()
    outcome: dict[str, Any] = {}
    if is_main_process():
        try:
            outcome = {"value": work()}
        except InputError as error:
            outcome = {"error": str(error)}
    outcome = json.loads(_from_first(json.dumps(outcome).encode()))
    if "error" in outcome:
        raise InputError.from_message(outcome["error"])
    value: T = outcome["value"]
    return value


def _from_first(content: bytes) -> bytes:
    import numpy as np
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content[:length].ljust(length), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


class Agreement:
    """Asks all processes the same question again and again: does any say yes?

    Each answer is that of the call before, so that no process waits for the slowest; alone, a
    process answers itself at once. All have to ask equally often.
    """

    def __init__(self, mesh: "Mesh"):
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self._everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(jax.numpy.any, out_shardings=replicated)
        self._asked: Any = None

    def __call__(self, yes: bool) -> bool:
        """Says yes or no, and returns what all said the last time."""
        if _count == 1:
            return yes
        import jax
        import numpy as np

        mine = np.full(jax.local_device_count(), yes)
        said = jax.make_array_from_process_local_data(self._everywhere, mine)
        asked, self._asked = self._asked, self._any(said)
        return asked is not None and bool(asked)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """On an error, one process of several ends without waiting for the others.

    They may be waiting for it in the middle of a step, which ends once it is gone; at a normal end
    all wait for each other.
    """
    try:
        yield
    except BaseException as error:
        if _count == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def explain(error: Exception) -> RunFailed | None:
    """What a failed step means among several processes; None for a process alone."""
    if _count == 1:
        return None
    reason = " ".join(str(error).split())[:200]
    return RunFailed(
        f"a step of several processes failed ({reason}); if another one died, its own log says "
        "why; the same commands go on from the last checkpoint"
    )
