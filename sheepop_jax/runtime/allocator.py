"""glibc malloc tuning for XLA's CPU backend, which reallocates its temporaries every step."""

import contextlib
import ctypes

FLOPS_A_BYTE = 400.0  # FLOPs per temporary byte; above, clearing pages takes < 1/7 of a step


def keep_freed_memory() -> None:
    """Configures glibc's malloc to keep freed memory for the next training step.

    XLA's CPU backend allocates its temporaries for each execution. By default glibc maps and unmaps
    such large blocks and the kernel clears every page again, which takes a third to a half of a
    small training step. A no-op without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # From malloc.h: M_TRIM_THRESHOLD (never return memory), M_TOP_PAD (grow by 64 MB), M_MMAP_MAX
    # (no separate mappings), M_ARENA_MAX (one heap: other arenas cannot hold large blocks). Set
    # before jax starts its threads, each of which would get its own arena.
    for parameter, value in ((-1, -1), (-2, 1 << 26), (-4, 0), (-8, 1)):
        mallopt(parameter, value)


def tune_allocator(flops: float, temporaries: int) -> None:
    """Returns freed memory to the system if keeping it saves little time.

    Called once the step is compiled. With fragmentation, a heap that keeps freed memory grows to up
    to twice a step's temporaries. Clearing pages costs about 0.4 ns per byte, so for steps with
    many FLOPs per byte, memory matters more than time.

    Args:
        flops: FLOPs per step.
        temporaries: bytes of temporaries per execution.
    """
    if flops < FLOPS_A_BYTE * temporaries:
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Restore M_MMAP_MAX and set M_MMAP_THRESHOLD to its maximum, so that large blocks get their
        # own mappings; then return the memory that compilation has freed.
        for parameter, value in ((-4, 1 << 16), (-3, 1 << 25)):
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
