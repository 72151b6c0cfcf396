"""The training loop, the only one: update, evaluate, log, flush, save, in this order."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sheepop_jax.checkpoint.checkpoints import BEST_METRIC, Checkpoints, SaveFailed
from sheepop_jax.config.schema import Config
from sheepop_jax.data.batch import Batch
from sheepop_jax.data.loader import TrainBatches
from sheepop_jax.formatting import format_seconds
from sheepop_jax.model.loss import CHUNK_ELEMENTS
from sheepop_jax.model.partitioning import global_batch
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.runtime import distributed
from sheepop_jax.training.curve import draw_curve
from sheepop_jax.training.divergence import DivergenceMonitor
from sheepop_jax.training.metrics import MetricsLog
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.profile import Profile
from sheepop_jax.training.progress import Progress
from sheepop_jax.training.resume import restore_or_init
from sheepop_jax.training.signals import StopRequested, StopSignal
from sheepop_jax.training.step import StepMetrics, TrainState, jit_step, make_train_step
from sheepop_jax.training.throughput import Throughput, flops_per_token
from sheepop_jax.training.watchdog import Watchdog

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2  # on the device: the one in use and the next


@dataclass(frozen=True)
class Job:
    """What a training run needs.

    Attributes:
        config: the whole configuration.
        directory: the run directory; `checkpoints/`, the log and the curve go there.
        model: with the dtype and the attention to train with.
        mesh: the devices.
        batches: step → batch.
        num_steps: updates of the whole run, resumed or not.
        evaluate: parameters → held-out figures, `val_loss` among them.
        sample: parameters → a text to show; None shows none.
        peak_flops: of all devices together, FLOP/s; 0 where unknown.
        chunk_elements: logits that the loss makes at a time, from `loss.chunk_elements`.
        on_compiled: told the train step's FLOPs and its temporaries in bytes, before the first.
    """

    config: Config
    directory: Path
    model: Transformer
    mesh: Mesh
    batches: TrainBatches
    num_steps: int
    evaluate: Callable[[Any], dict[str, float]]
    sample: Callable[[Any], str] | None
    peak_flops: float
    chunk_elements: int = CHUNK_ELEMENTS
    on_compiled: Callable[[float, int], None] = lambda flops, temporaries: None


def fit(job: Job, stop: StopSignal) -> dict[str, float]:
    """Trains to `job.num_steps`, from the newest whole checkpoint if there is one.

    Returns:
        The held-out figures of the last step.

    Raises:
        StopRequested: a signal came; what was done is saved.
        TrainingDiverged: `train.max_skipped_steps` updates in a row were skipped.
        SaveFailed: a checkpoint could not be written.
        JaxRuntimeError: a step failed: no memory left, or another process gone.
        InputError: every checkpoint is damaged.
    """
    with jax.set_mesh(job.mesh):
        loop = _Loop(job, stop)
        try:
            return loop.run()
        finally:
            loop.close()


class _Loop:
    """One process's run of the loop; its fields are what survives from step to step."""

    def __init__(self, job: Job, stop: StopSignal):
        config = job.config
        self.job, self.stop = job, stop
        self.schedule = make_schedule(config.optimizer, job.num_steps)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.checkpoints = Checkpoints(job.directory / "checkpoints", config.checkpoint.keep)
        self.state, self.shardings, saved = restore_or_init(
            job.model, self.optimizer, config.seed, job.mesh, self.checkpoints
        )
        self.step = self.saved_step = int(self.state.step)
        self.best = distributed.broadcast_from_main(self.checkpoints.best_score)
        # Figures of the evaluation at this very step; empty where there was none.
        self.figures = {name: value for name, value in saved.items() if name.startswith("val_")}
        shown = distributed.is_main_process()
        self.metrics = MetricsLog(job.directory, self.step, bool(self.figures)) if shown else None
        self.progress = Progress(self.step, job.num_steps, shown)
        self.throughput = Throughput(
            self.step,
            saved.get("train_seconds", 0.0),
            config.train.sequences_per_update * config.data.seq_len,
            flops_per_token(self.state.params, config),
            job.peak_flops,
        )
        self.first_step = self.step
        self.watchdog = Watchdog()
        self.health = DivergenceMonitor(config.train.max_skipped_steps)
        profiled = config.train.profile_steps if shown else 0
        self.profile = Profile(profiled, self.step, job.directory / "profile")
        self.data_wait = 0.0
        self.in_flight: StepMetrics | None = None
        self.save_postponed = False

    def run(self) -> dict[str, float]:
        last = self.job.num_steps
        self._evaluate_what_was_interrupted()
        if self.step >= last:
            log.info("nothing to do: the run is at step %d of %d", self.step, last)
            return self.figures
        batches = self._device_batches()
        batch = next(batches)
        train_step = self._compile(batch)
        self.stop.something_to_save(distributed.Agreement(self.job.mesh))
        self.throughput.start()
        self.watchdog.resume()
        try:
            while self.step < last:
                self.stop.check()
                if self.profile.due(self.step):
                    with self._clock_stopped():
                        self.profile.turn(self.step)
                with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
                    self.state, metrics = train_step(self.state, batch)
                self._account()  # for the step before, while this one runs
                self.step, self.figures, self.in_flight = self.step + 1, {}, metrics
                waiting_since = time.perf_counter()
                if self.step < last:
                    batch = next(batches)
                self.data_wait += time.perf_counter() - waiting_since
                self._evaluate_and_save()
        except StopRequested:
            self._account()
            if self.step > self.saved_step:
                self._save()
            self.checkpoints.wait()
            raise
        self.checkpoints.wait()
        return self.figures

    def close(self) -> None:
        """Leaves nothing open; a save that fails while another error is on its way is logged."""
        self.watchdog.close()
        self.profile.close(self.step)
        self.progress.close()
        try:
            self.checkpoints.wait()
        except SaveFailed as error:
            log.error("%s", error)
        if self.metrics:
            self.metrics.close()
            draw_curve(self.job.directory)

    def _device_batches(self) -> Iterator[Batch]:
        """Batches on the device, the next one on its way while one is in use."""
        put = partial(global_batch, self.job.mesh, self.job.config.train.batch_size, 1)
        queue: deque[Batch] = deque()
        for batch in self.job.batches.iterate(self.step, self.job.num_steps):
            queue.append(put(batch))
            if len(queue) == BATCHES_AHEAD:
                yield queue.popleft()
        yield from queue

    def _compile(self, batch: Batch) -> Callable[..., tuple[TrainState, StepMetrics]]:
        job, config = self.job, self.job.config
        seed, zscore = config.seed, config.optimizer.max_grad_zscore
        step = make_train_step(
            job.model, self.optimizer, self.schedule, seed, zscore, job.chunk_elements
        )
        log.info("compiling the train step")
        started = time.perf_counter()
        jitted = jit_step(step, self.shardings, job.mesh, config.model.remat)
        compiled = jitted.lower(self.state, batch).compile()
        log.info("train step compiled in %.1f s", time.perf_counter() - started)
        if memory := compiled.memory_analysis():  # not every backend has one
            job.on_compiled(self.throughput.flops_per_step, memory.temp_size_in_bytes)
        return compiled

    def _account(self) -> None:
        """Waits for the numbers of the step in flight, looks at them, and reports."""
        if self.in_flight is None:
            return
        metrics, self.in_flight = self.in_flight, None
        self.health.look(self.step, metrics)  # fetches what it needs: the wait is here
        self.progress.advance()
        self.watchdog.step(self.step)
        if self.step == self.first_step + 1:
            self.throughput.warmed_up(self.step)
        per_step = self.throughput.seconds_per_step(self.step)
        left = (self.job.num_steps - self.step) * per_step
        # The first step includes what happens only once: wait for others, unless steps are long.
        if self.step == self.first_step + (4 if self.throughput.warm_seconds < 5 else 1):
            self.progress.line(f"{per_step:.3g} s a step: about {format_seconds(left)} to go")
        if self.step % self.job.config.train.log_every == 0 or self.step == self.job.num_steps:
            self._report(metrics, left)

    def _report(self, metrics: StepMetrics, seconds_left: float) -> None:
        metrics = jax.device_get(metrics)
        values = {
            "loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "skipped": bool(metrics.skipped),
            "data_wait_seconds": self.data_wait,
            **self.throughput.interval(self.step),
        }
        self.data_wait = 0.0
        self.progress.report(self.step, values, seconds_left)
        if self.metrics:
            self.metrics.write(self.step, values)
            self.metrics.flush()

    def _evaluate_what_was_interrupted(self) -> None:
        """A signal during an evaluation saves the step without its figures: here they come."""
        due = _due(self.step, self.job.config.train.eval_every, self.job.num_steps)
        if self.step and due and not self.figures:
            self._evaluate()
            if distributed.is_main_process():
                self.checkpoints.record(self.step, self.figures)

    def _evaluate_and_save(self) -> None:
        """Does what is due after this step, with the clock stopped."""
        last, config = self.job.num_steps, self.job.config
        evaluate = _due(self.step, config.train.eval_every, last)
        save = _due(self.step, config.checkpoint.save_every, last)
        save |= self.save_postponed and not self.health.streak
        if not (evaluate or save):
            return
        with self._clock_stopped():
            better = evaluate and self._evaluate()
            save |= better
            # Parameters from which no update is possible must not take the place of older ones.
            wait = self.health.streak > 0 and not better and self.step < last
            self.save_postponed = wait and (save or self.save_postponed)
            if save and not wait:
                self._save()

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """For what is no update: the step in flight is waited for, and no clock runs."""
        self._account()
        self.throughput.stop()
        self.watchdog.pause()
        yield
        self.throughput.start()
        self.watchdog.resume()

    def _evaluate(self) -> bool:
        """Evaluates, shows and logs; returns whether this is the best so far."""
        started = time.perf_counter()
        self.figures = figures = self.job.evaluate(self.state.params)
        train_seconds = self.throughput.seconds
        took = time.perf_counter() - started
        self.progress.report_held_out(self.step, figures, took, train_seconds)
        if self.metrics:
            self.metrics.write(self.step, {**figures, "train_seconds": train_seconds})
            self.metrics.flush()
        if self.job.sample:
            text = self.job.sample(self.state.params)
            self.progress.line("sample: " + text.strip("\n").replace("\n", "\n        "))
        better = figures[BEST_METRIC] < self.best
        self.best = min(self.best, figures[BEST_METRIC])
        return better

    def _save(self) -> None:
        figures = {**self.figures, "train_seconds": self.throughput.seconds}
        self.checkpoints.save(self.state, figures)
        self.saved_step = self.step
        if self.metrics:
            draw_curve(self.job.directory)


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens now."""
    return step == last or (every > 0 and step % every == 0)
