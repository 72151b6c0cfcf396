"""Profiling: a trace of a few training steps."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)

# Steps before the trace starts; the first ones include one-time work.
_STEPS_BEFORE = 2


class Profile:
    """Records one `jax.profiler` trace per process.

    The files in `directory` open in TensorBoard's profile plugin and ui.perfetto.dev.
    """

    def __init__(self, steps: int, first_step: int, directory: Path):
        """Schedules a trace of `steps` steps (0: none) in a process that starts at `first_step`."""
        self._directory = directory
        begin = first_step + _STEPS_BEFORE
        self._turns = {begin, begin + steps} if steps else set()
        self._first: int | None = None  # first step of the running trace

    def due(self, step: int) -> bool:
        """Whether the trace starts or stops after `step` steps."""
        return step in self._turns

    def turn(self, step: int) -> None:
        """Starts or stops the trace; call while the device is idle."""
        if self._first is not None:
            self.close(step)
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls make traces large and add little
        directory = str(self._directory)
        jax.profiler.start_trace(directory, create_perfetto_trace=True, profiler_options=options)
        self._first = step + 1

    def close(self, step: int) -> None:
        """Stops the trace if it is running."""
        if self._first is None:
            return
        first, self._first = self._first, None
        jax.profiler.stop_trace()
        log.info(
            "profile of steps %d to %d in %s: open its newest perfetto_trace.json.gz at "
            "ui.perfetto.dev, or the directory with TensorBoard's profile plugin",
            *(first, step, self._directory),
        )
