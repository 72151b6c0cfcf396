"""Machine limits: the FLOP/s of a large matmul and the memory bandwidth."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sheepop_jax.runtime.devices import known_figures


def measure(dtype: str = "float32") -> dict[str, float]:
    """Measures with XLA and, on a CPU, also with NumPy's BLAS; reports the best of several runs.

    Returns:
        `matmul_GFLOP_s`: rate of an n x n x n matmul, 2 · n³ FLOPs, with n = 2048 (8192 on an
        accelerator). `peak_GFLOP_s`: the manufacturer's bf16 peak, or the measured rate if unknown.
        `read_GB_s`: bandwidth of a matrix-vector product, which reads each element once; the matrix
        (400 MB in fp32) is far larger than the caches. `cores`: CPU cores of this process.
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
    """Returns the seconds of the fastest run, since slower ones reflect other load."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
