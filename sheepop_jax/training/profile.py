"""A trace of a few steps, for a person to look at."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)

# Steps of this process before the trace begins: the first ones do what happens only once.
_STEPS_BEFORE = 2


class Profile:
    """Records `jax.profiler`'s trace of some steps, once in a process.

    Writes to `directory` what TensorBoard's profile plugin and ui.perfetto.dev show.
    """

    def __init__(self, steps: int, first_step: int, directory: Path):
        """Plans a trace of `steps` steps (0: none), for a process that begins at `first_step`."""
        self._directory = directory
        begin = first_step + _STEPS_BEFORE
        self._turns = {begin, begin + steps} if steps else set()
        self._first: int | None = None  # of a trace that is running

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends after `step` steps."""
        return step in self._turns

    def turn(self, step: int) -> None:
        """Begins the trace, or ends it; the device should have nothing to do."""
        if self._first is not None:
            self.close(step)
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call in Python: long to write, little to see
        directory = str(self._directory)
        jax.profiler.start_trace(directory, create_perfetto_trace=True, profiler_options=options)
        self._first = step + 1

    def close(self, step: int) -> None:
        """Ends a trace that is running."""
        if self._first is None:
            return
        first, self._first = self._first, None
        jax.profiler.stop_trace()
        log.info(
            "profile of steps %d to %d in %s: open the newest perfetto_trace.json.gz below it at "
            "ui.perfetto.dev, or the folder with TensorBoard's profile plugin",
            *(first, step, self._directory),
        )
