"""What malloc is told, by a library that only listens."""

import pytest

from sheepop_jax.runtime import allocator


@pytest.mark.parametrize(("flops", "settled"), [(399.0, False), (400.0, True)])
def test_freed_memory_is_given_back_where_steps_are_long_for_their_memory(
    monkeypatch, flops, settled
):
    calls = []

    class Library:
        def __init__(self, name):
            self.mallopt = lambda parameter, value: calls.append((parameter, value))
            self.malloc_trim = lambda keep: calls.append(keep)

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    allocator.tune_allocator(1e6 * flops, 1_000_000)
    assert calls == ([(-4, 1 << 16), (-3, 1 << 25), 0] if settled else [])


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_memory_is_left_alone_without_glibc(monkeypatch, error):
    def missing(name):
        raise error

    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    allocator.tune_allocator(1e12, 1)
