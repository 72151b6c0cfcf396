"""What the machine allows: the rate of a large matrix product, and how fast memory is read."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sheepop_jax.runtime.platform import known_figures


def measure(dtype: str = "float32") -> dict[str, float]:
    """Best of several, by XLA and, on a CPU, by NumPy's BLAS.

    Returns:
        `matmul_GFLOP_s`: of a cube of 2048 (8192 on an accelerator), 2 · n³ operations. `peak`: the
        maker's figure for bf16, GFLOP/s, or, where it is not known, the one measured. `read_GB_s`:
        of a product of a matrix of 400 MB, far beyond the caches, with a vector, which reads each
        element once. `cores`: that this process may use.
    """
    import jax
    import jax.numpy as jnp

    [device, *_] = jax.devices()
    on_cpu = device.platform == "cpu"
    n = 2048 if on_cpu else 8192
    square = np.random.default_rng(0).standard_normal((n, n), np.float32)
    tall = np.ones((50_000, 2048), np.float32)
    vector = np.ones(2048, np.float32)
    times = jax.jit(lambda a, b: a @ b)
    on_device = [jnp.asarray(array, dtype) for array in (square, tall, vector)]
    rates = [2.0 * n**3 / best(lambda: times(on_device[0], on_device[0]).block_until_ready())]
    reads = [on_device[1].nbytes / best(lambda: times(*on_device[1:]).block_until_ready())]
    if on_cpu:
        rates.append(2.0 * n**3 / best(lambda: square @ square))
        reads.append(tall.nbytes / best(lambda: tall @ vector))
    peak = known_figures(device.device_kind)[0] or max(rates)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "matmul_GFLOP_s": round(max(rates) / 1e9),
        "peak_GFLOP_s": round(peak / 1e9),
        "read_GB_s": round(max(reads) / 1e9, 1),
    }


def best(work: Callable[[], Any], repeats: int = 15) -> float:
    """Seconds of the fastest of several runs: what the machine can do, not what it does."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
