"""The training loop: update, evaluate, log, flush, save, in this order."""

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

from sheepop_jax.checkpoint.checkpoints import BEST_METRIC
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.checkpoint.storage import wait_for_all
from sheepop_jax.checkpoint.workdir import DirectoryLost, HeldDirectory
from sheepop_jax.config.schema import Config
from sheepop_jax.data.batch import Batch
from sheepop_jax.data.loader import TrainBatches
from sheepop_jax.errors import RunFailed
from sheepop_jax.formatting import format_seconds
from sheepop_jax.model.lora import adapted
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
from sheepop_jax.training.resume import load_frozen, restore_or_init
from sheepop_jax.training.signals import StopRequested, StopSignal
from sheepop_jax.training.step import StepMetrics, jit_step, make_train_step
from sheepop_jax.training.throughput import Throughput
from sheepop_jax.training.watchdog import Watchdog

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2  # batches on the device: the current one and the next


@dataclass(frozen=True)
class Job:
    """The inputs of a training run.

    Attributes:
        config: the complete configuration.
        directory: the run directory, for checkpoints, metrics and the training curve.
        model: the model, with its training dtype and attention implementation.
        mesh: the device mesh.
        batches: the training batches by step.
        num_steps: total updates of the run, including those before a resume.
        evaluate: parameters → validation metrics, including `val_loss`.
        sample: parameters → a sample text to print; None prints none.
        flops_per_token: model FLOPs per token, forward and backward.
        peak_flops: FLOP/s of all devices together; 0 if unknown.
        chunk_elements: logits computed at a time by the chunked loss (`loss.chunk_elements`).
        load_params: abstract parameters with shardings → the parameters that a new run starts with,
            or that the adapters of a new or resumed run adapt; None draws them.
        on_compiled: called before the first step with the train step's FLOPs and temporary bytes.
    """

    config: Config
    directory: Path
    model: Transformer
    mesh: Mesh
    batches: TrainBatches
    num_steps: int
    evaluate: Callable[[Any], dict[str, float]]
    sample: Callable[[Any], str] | None
    flops_per_token: float
    peak_flops: float
    chunk_elements: int = CHUNK_ELEMENTS
    load_params: Callable[[Any], Any] | None = None
    on_compiled: Callable[[float, int], None] = lambda flops, temporaries: None


def fit(job: Job, stop: StopSignal) -> dict[str, float]:
    """Trains up to `job.num_steps`, resuming from the newest valid checkpoint if any.

    Args:
        job: the inputs of the run.
        stop: the stop signal, checked before every step.

    Returns:
        The validation metrics of the last step.

    Raises:
        StopRequested: a signal arrived; the state is saved.
        TrainingDiverged: `train.max_skipped_steps` consecutive updates were skipped.
        SaveFailed: a checkpoint could not be written.
        RunFailed: the run directory was renamed (the state is saved there) or deleted.
        JaxRuntimeError: a step failed, e.g. out of memory or a lost process.
        InputError: every checkpoint is damaged.
    """
    with jax.set_mesh(job.mesh):
        loop = _Loop(job, stop)
        try:
            return loop.run()
        finally:
            loop.close()


class _Loop:
    """The loop of one process; its fields are the host state carried between steps."""

    def __init__(self, job: Job, stop: StopSignal):
        config = job.config
        self.job, self.stop = job, stop
        self.schedule = make_schedule(config.optimizer, job.num_steps)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.held = HeldDirectory(job.directory)
        self.checkpoints = CheckpointSaver(
            job.directory / "checkpoints", config.checkpoint.keep, self.held
        )
        load_params = job.load_params
        self.frozen: Any = None  # the parameters below the adapters
        if job.model.lora and load_params:
            self.frozen, load_params = load_frozen(job.model, job.mesh, load_params), None
        self.state, self.shardings, saved = restore_or_init(
            job.model, self.optimizer, config.seed, job.mesh, self.checkpoints, load_params
        )
        self.step = self.saved_step = self.first_step = int(self.state.step)
        self.best = distributed.broadcast_from_main(self.checkpoints.best_score)
        # Validation metrics of the current step; empty if it was not evaluated.
        self.figures = {name: value for name, value in saved.items() if name.startswith("val_")}
        shown = distributed.is_main_process()
        self.metrics = None
        if shown:
            self.metrics = MetricsLog(job.directory, self.step, bool(self.figures), config)
        self.progress = Progress(self.step, job.num_steps, shown)
        self.throughput = Throughput(
            self.step,
            saved.get("train_seconds", 0.0),
            config.train.sequences_per_update * config.data.seq_len,
            job.flops_per_token,
            job.peak_flops,
        )
        self.watchdog = Watchdog()
        self.health = DivergenceMonitor(config.train.max_skipped_steps)
        profiled = config.train.profile_steps if shown else 0
        self.profile = Profile(profiled, self.step, job.directory / "profile")
        self.data_wait, self.save_postponed = 0.0, False
        self.mean_loss = MeanLoss(saved.get("loss_sum", 0.0), int(saved.get("loss_steps", 0)))
        self.in_flight: StepMetrics | None = None
        self.moved = False  # whether a rename of the run directory was noticed

    def run(self) -> dict[str, float]:
        last = self.job.num_steps
        self._evaluate_what_was_interrupted()
        if self.step >= last:
            log.info("training is complete: step %d of %d", self.step, last)
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
                    self.state, metrics = train_step(self.state, batch, self.frozen)
                self._account()  # fetch the previous step's metrics while this step runs
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
            if (moved := self.held.where()) != self.job.directory:
                saved = f"saved step {self.step} there" if self.step else "with nothing to save"
                raise RunFailed(
                    f"{self.job.directory}: renamed to {moved} during training; stopped, {saved}; "
                    "resume it from there"
                ) from None
            raise
        self.checkpoints.wait()
        if (moved := self.held.where()) != self.job.directory:
            log.warning("%s is now %s", self.job.directory, moved)
        return self.figures

    def close(self) -> None:
        """Releases all resources; logs a failed save, so that it does not mask another error."""
        self.watchdog.close()
        self.profile.close(self.step)
        self.progress.close()
        try:
            self.checkpoints.wait()
        except RunFailed as error:
            log.error("%s", error)
        if self.metrics:
            self.metrics.close()
            with contextlib.suppress(DirectoryLost):
                draw_curve(self.held.where())
        self.held.close()

    def _device_batches(self) -> Iterator[Batch]:
        """Yields batches on the device; transfers the next one while the current one is in use."""
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
        compiled = jitted.lower(self.state, batch, self.frozen).compile()
        log.info("train step compiled in %.1f s", time.perf_counter() - started)
        wait_for_all("train step")  # compile times differ, e.g. with a cache in process 0 only
        if memory := compiled.memory_analysis():  # not every backend has one
            job.on_compiled(self.throughput.flops_per_step, memory.temp_size_in_bytes)
        return compiled

    def _account(self) -> None:
        """Waits for the step in flight, checks its metrics, and reports."""
        if self.in_flight is None:
            return
        metrics, self.in_flight = self.in_flight, None
        self.mean_loss.add(self.health.look(self.step, metrics))  # blocks until the step ends
        self.progress.advance()
        self.watchdog.step(self.step)
        if self.step == self.first_step + 1:
            self.throughput.warmed_up(self.step)
        per_step = self.throughput.seconds_per_step(self.step)
        left = (self.job.num_steps - self.step) * per_step
        # The first step includes one-time work: estimate after four steps, unless steps are long.
        if self.step == self.first_step + (4 if self.throughput.warm_seconds < 5 else 1):
            self.progress.line(f"{per_step:.3g} s/step, about {format_seconds(left)} left")
        if self.step % self.job.config.train.log_every == 0 or self.step == self.job.num_steps:
            self._report(metrics, left)

    def _report(self, metrics: StepMetrics, seconds_left: float) -> None:
        metrics = jax.device_get(metrics)
        values = {
            "loss": self.mean_loss.take(default=float(metrics.loss)),
            "step_loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "skipped": bool(metrics.skipped),
            "data_wait_seconds": self.data_wait,
            "epoch": self.job.batches.epochs(self.step),
            **self.throughput.interval(self.step),
        }
        self.data_wait = 0.0
        self._stop_if_moved()
        self.progress.report(self.step, values, seconds_left)
        if self.metrics:
            self.metrics.write(self.step, values)
            self.metrics.flush()

    def _evaluate_what_was_interrupted(self) -> None:
        """Evaluates the restored step if a signal interrupted its evaluation."""
        due = _due(self.step, self.job.config.train.eval_every, self.job.num_steps)
        if self.step and due and not self.figures:
            self._evaluate()
            if distributed.is_main_process():
                self.checkpoints.record(self.step, self.figures)

    def _evaluate_and_save(self) -> None:
        """Evaluates and saves if due after this step, with the clock stopped."""
        last, config = self.job.num_steps, self.job.config
        evaluate = _due(self.step, config.train.eval_every, last)
        save = _due(self.step, config.checkpoint.save_every, last)
        save |= self.save_postponed and not self.health.streak
        if not (evaluate or save):
            return
        with self._clock_stopped():
            better = evaluate and self._evaluate()
            save |= better
            # While updates are being skipped, keep older checkpoints: postpone the save.
            wait = self.health.streak > 0 and not better and self.step < last
            self.save_postponed = wait and (save or self.save_postponed)
            if save and not wait:
                self._save()

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Waits for the step in flight, and pauses throughput and watchdog."""
        self._account()
        self.throughput.stop()
        self.watchdog.pause()
        yield
        self.throughput.start()
        self.watchdog.resume()

    def _evaluate(self) -> bool:
        """Evaluates, prints and logs; returns whether the validation loss is the best so far."""
        started = time.perf_counter()
        params = self._params()
        self.figures = figures = self.job.evaluate(params)
        train_seconds = self.throughput.seconds
        took = time.perf_counter() - started
        self.progress.report_validation(self.step, figures, took, train_seconds)
        if self.metrics:
            self.metrics.write(self.step, {**figures, "train_seconds": train_seconds})
            self.metrics.flush()
        if self.job.sample:
            text = self.job.sample(params)
            self.progress.line("sample: " + text.strip("\n").replace("\n", "\n        "))
            if self.metrics:
                self.metrics.write_sample(self.step, text)
        better = figures[BEST_METRIC] < self.best
        self.best = min(self.best, figures[BEST_METRIC])
        return better

    def _params(self) -> Any:
        """The parameters of the model, adapted if it has adapters."""
        lora, trained = self.job.model.lora, self.state.params
        return adapted(self.frozen, trained, lora) if lora else trained

    def _stop_if_moved(self) -> Path:
        """Where the run directory is now; stops with a save there if it was renamed.

        Raises:
            DirectoryLost: it was deleted.
        """
        where = self.held.where()
        if where != self.job.directory and not self.moved:
            self.moved = True
            log.warning(
                "%s was renamed to %s: saving there and stopping", self.job.directory, where
            )
            self.stop.request("renamed run directory")
        return where

    def _save(self) -> None:
        where = self._stop_if_moved()
        mean = self.mean_loss
        saved = {"train_seconds": self.throughput.seconds}
        saved |= {"loss_sum": mean.sum, "loss_steps": mean.steps} if mean.steps else {}
        self.checkpoints.save(self.state, {**self.figures, **saved})
        self.saved_step = self.step
        if self.metrics:
            draw_curve(where)


@dataclass
class MeanLoss:
    """The mean loss of the updates since the last log line.

    Saved with each checkpoint, so that a resumed run logs the same values as an uninterrupted one.
    The losses are already on the host for `DivergenceMonitor`, so the mean costs no transfer.
    """

    sum: float = 0.0
    steps: int = 0

    def add(self, loss: float | None) -> None:
        """Adds the loss of a step; None (a skipped update) is ignored."""
        if loss is not None:
            self.sum, self.steps = self.sum + loss, self.steps + 1

    def take(self, default: float) -> float:
        """Returns the mean, or `default` if every update was skipped, and resets."""
        mean = self.sum / self.steps if self.steps else default
        self.sum, self.steps = 0.0, 0
        return mean


def _due(step: int, every: int, last: int) -> bool:
    """Whether an action that runs every `every` steps (0: never) and at the last step is due."""
    return step == last or (every > 0 and step % every == 0)
