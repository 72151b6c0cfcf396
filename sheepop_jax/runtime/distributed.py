"""Multi-process training: initialize, broadcast, agree on a stop step, shut down.

Only this module handles other processes; a single process incurs no overhead. jax and numpy are
imported lazily: JAX must be configured before its import (`platform`), and without them installed
the CLI must still run far enough to report that (`cli`).
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
from sheepop_jax.runtime import streams

if TYPE_CHECKING:
    from jax.sharding import Mesh

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10  # without a heartbeat for this long, a process counts as dead
_SHUTDOWN_SECONDS = 60  # maximum wait for the other processes at shutdown
AUTO = "auto"
_LOOPBACK = ("localhost", "127.", "[::1]")

T = TypeVar("T")

_index, _count = 0, 1  # process index and number of processes; set by `initialize`


@dataclass(frozen=True)
class DistributedConfig:
    """Multi-process settings from the command line; None if not given.

    Attributes:
        coordinator_address: HOST:PORT of process 0, or "auto" for JAX's cluster detection.
        num_processes: number of processes.
        process_id: index of this process, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        address, count, index = self.coordinator_address, self.num_processes, self.process_id
        given = [value for value in (address, count, index) if value is not None]
        if address == AUTO and len(given) > 1:
            rule = "HOST:PORT if `num_processes` or `process_id` is set"
            raise InputError("coordinator_address", address, rule)
        if address == AUTO or not given:
            return
        if address is None or count is None or index is None:
            rule = "`coordinator_address`, `num_processes` and `process_id` together"
            raise InputError("processes", given, rule, "omitting all under SLURM or Open MPI")
        if not re.fullmatch(r".+:[0-9]{1,5}", address):
            raise InputError("coordinator_address", address, "HOST:PORT or auto")
        if count < 1:
            raise InputError("num_processes", count, "at least 1")
        if not 0 <= index < count:
            raise InputError("process_id", index, f"at least 0 and below `num_processes` = {count}")


def initialize(member: DistributedConfig) -> None:
    """Connects to the other processes; a no-op for a single process.

    Must be called before JAX initializes its devices.

    Raises:
        InputError: the connection failed.
    """
    address = member.coordinator_address
    if address is None and _started_by_a_launcher():
        address = _on_this_host() or AUTO
    if address is None or member.num_processes == 1:
        return
    import jax

    # JAX's preemption service would intercept SIGTERM before `StopSignal`.
    jax.config.update("jax_enable_preemption_service", False)
    # With None, JAX detects the cluster.
    found = "deactivate" if member.process_id is not None else None
    try:
        jax.distributed.initialize(
            coordinator_address=None if address == AUTO else address,
            num_processes=member.num_processes,
            process_id=member.process_id,
            cluster_detection_method=found,
            # The connection is neither encrypted nor authenticated. If all processes run on one
            # host, bind to the loopback interface.
            coordinator_bind_address=address if address.startswith(_LOOPBACK) else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            "coordinator_address", address, f"the address of a running process 0 ({reason})"
        ) from None
    global _index, _count
    _index, _count = jax.process_index(), jax.process_count()
    _leave_stdout_to_results()
    if not (is_main_process() or log.isEnabledFor(logging.DEBUG)):
        logging.getLogger("sheepop_jax").setLevel(logging.ERROR)


def _started_by_a_launcher() -> bool:
    """Whether SLURM, Open MPI or JAX's environment variables indicate several processes.

    Cloud TPU and Kubernetes are not detected; use the flags there.
    """
    env = os.environ
    in_a_step = "SLURM_STEP_NODELIST" in env  # not set in the batch script itself
    counts = (env.get("SLURM_NTASKS") if in_a_step else None, env.get("OMPI_COMM_WORLD_SIZE"))
    several = any(count and count.isdecimal() and int(count) > 1 for count in counts)
    return several or "JAX_COORDINATOR_ADDRESS" in env


def _on_this_host() -> str | None:
    """A loopback coordinator address if all processes run on one host, else None."""
    env = os.environ
    ranks = env.get("OMPI_COMM_WORLD_SIZE")
    if env.get("SLURM_STEP_NUM_NODES") == "1":
        job = f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
    elif ranks and ranks == env.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        job = env.get("OMPI_MCA_orte_hnp_uri") or env.get("PMIX_NAMESPACE") or ""
    else:
        return None
    return f"127.0.0.1:{61440 + zlib.crc32(job.encode()) % 4096}"  # same port range as JAX


def _leave_stdout_to_results() -> None:
    """Redirects descriptor 1 to stderr, as Gloo and NCCL log to it; `sys.stdout` is unchanged."""
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = streams.lenient(results, "stdout", sys.stdout)


def count() -> int:
    """The number of processes."""
    return _count


def index() -> int:
    """The index of this process, from 0."""
    return _index


def is_main_process() -> bool:
    """Whether this is process 0, which prints, logs and makes decisions."""
    return _index == 0


def broadcast_from_main(work: Callable[[], T]) -> T:
    """Runs `work` in process 0 and returns its result in all processes.

    Args:
        work: returns a JSON-serializable value.

    Raises:
        InputError: `work` raised it in process 0; raised in all processes.
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
    """Computes a logical OR over all processes, once per call.

    Each call returns the result of the previous call, so no process waits for the slowest. A single
    process gets its own value immediately. All processes must make the same number of calls.
    """

    def __init__(self, mesh: "Mesh"):
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self._everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(jax.numpy.any, out_shardings=replicated)
        self._asked: Any = None

    def __call__(self, yes: bool) -> bool:
        """Submits this process's value; returns the OR over all processes of the previous call."""
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
    """On an error in a multi-process run, exits immediately without waiting for the others.

    The other processes may be waiting for this one within a step, which fails once it has exited.
    On success, all processes wait for each other.
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
    """Describes a failed step of a multi-process run; None for a single process."""
    if _count == 1:
        return None
    reason = " ".join(str(error).split())[:200]
    return RunFailed(
        f"a multi-process step failed ({reason}); if another process died, its log shows the "
        "cause; run the same commands again to resume from the last checkpoint"
    )
