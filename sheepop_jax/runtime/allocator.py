"""What glibc's malloc does with freed memory, which XLA's CPU backend asks for again each step."""

import contextlib
import ctypes

FLOPS_A_BYTE = 400.0  # of a step's temporaries: from here on clearing them is under a seventh of it


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed, for the next training step to use.

    XLA's CPU backend allocates its temporaries anew for each execution. By default glibc maps and
    unmaps such large blocks, and the kernel clears every page again: a third to a half of the time
    of a small training step. Elsewhere than on glibc, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # The numbers of malloc.h: M_TRIM_THRESHOLD (never give back), M_TOP_PAD (grow by 64 MB),
    # M_MMAP_MAX (no block of its own mapping), M_ARENA_MAX (one heap: others cannot hold large
    # blocks). Before jax starts its threads, which would each take a heap of their own.
    for parameter, value in ((-1, -1), (-2, 1 << 26), (-4, 0), (-8, 1)):
        mallopt(parameter, value)


def tune_allocator(flops: float, temporaries: int) -> None:
    """Gives freed memory back again where keeping it gains little; told once a step is compiled.

    A heap that keeps all takes up to twice a step's temporaries, since what is freed lies in
    pieces. Clearing pages costs about 0.4 ns a byte, so for a step of many FLOPs a byte memory is
    worth more than time.

    Args:
        flops: of one step.
        temporaries: bytes that its program allocates each time.
    """
    if flops < FLOPS_A_BYTE * temporaries:
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX as it was, M_MMAP_THRESHOLD at the most that it takes: large blocks are mapped
        # on their own from now on. What compiling has left goes back at once.
        for parameter, value in ((-4, 1 << 16), (-3, 1 << 25)):
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
