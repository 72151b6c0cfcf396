"""Preparations in processes of their own, which may die at a given point."""

import importlib
import multiprocessing
import os
import signal
from functools import partial

from sheepop_jax.config.data import DataConfig
from sheepop_jax.data.preprocess import encode
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.sources import paths

UNIT_BYTES = 700  # some ten units

# One process imports the library; each preparation is a fork of it.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])


def start(config, die=None):
    """A process that prepares; `die` is (module, function, n-th call, "before" or "after" it)."""
    process = _PROCESSES.Process(target=_prepare, args=(config.__dict__, die), daemon=True)
    process.start()
    return process


def _prepare(fields, die):
    os.fsync = lambda file: None
    paths._SETTLED_SECONDS = 0
    encode._UNIT_BYTES = UNIT_BYTES
    if die:
        _let_die(*die)
    prepare(DataConfig(**fields))


def _let_die(place, name, calls, when):
    holder = importlib.import_module(f"sheepop_jax.data.preprocess.{place}")
    for part in name.split(".")[:-1]:
        holder = getattr(holder, part)
    name, count = name.split(".")[-1], 0
    inner, kill = getattr(holder, name), partial(os.kill, os.getpid(), signal.SIGKILL)

    def dying(*arguments, **named):
        nonlocal count
        count += 1
        if count == calls and when == "before":
            kill()
        found = inner(*arguments, **named)
        if count == calls:
            kill()
        return found

    setattr(holder, name, dying)


def killed(config, death):
    """Lets a preparation die."""
    process = start(config, death)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def content_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names_in(directory):
    """What is in a cache, but for its memory."""
    there = directory.iterdir() if directory.exists() else ()
    return sorted(path.name for path in there if path.name != "sources")
