"""Divergence detection: skipped updates and loss spikes."""

import collections
import logging
import math
import statistics

from sheepop_jax.errors import RunFailed
from sheepop_jax.training.step import StepMetrics

log = logging.getLogger(__name__)

_WINDOW = 200  # steps in the running statistics
_ENOUGH = 20  # minimum steps before spikes are reported
_SPIKE = 6.0  # standard deviations above the mean


class TrainingDiverged(RunFailed):
    """Too many consecutive updates were skipped for their gradients."""


class DivergenceMonitor:
    """Checks the metrics of every step."""

    def __init__(self, max_skipped_steps: int):
        self._max_skipped = max_skipped_steps
        self._skipped_in_a_row = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    @property
    def streak(self) -> int:
        """Consecutive skipped updates, up to the last step checked."""
        return self._skipped_in_a_row

    def look(self, step: int, metrics: StepMetrics) -> float | None:
        """Waits for a step's metrics, and warns about a skipped update or a loss spike.

        Returns:
            The step's loss; None for a skipped update.

        Raises:
            TrainingDiverged: `train.max_skipped_steps` consecutive updates were skipped.
        """
        # Fetch only the needed scalars: each transfer costs loop time.
        loss = metrics.loss.item()
        if metrics.skipped.item():
            self._skipped_in_a_row += 1
            norm = float(metrics.grad_norm)
            finite = math.isfinite(norm) and math.isfinite(loss)
            why = f"gradient norm {norm:.3g} is an outlier" if finite else "non-finite gradients"
            log.warning("step %d skipped: %s", step, why)
            if self._skipped_in_a_row >= self._max_skipped:
                raise TrainingDiverged(
                    f"{self._skipped_in_a_row} consecutive updates skipped, the last at step "
                    f"{step} ({why}); lower optimizer.learning_rate or check the data"
                )
            return None
        self._skipped_in_a_row = 0
        if len(self._losses) >= _ENOUGH:
            mean, count = statistics.fmean(self._losses), len(self._losses)
            # Not statistics.pstdev: its exact fractions cost 0.1 ms per step.
            deviation = math.dist(self._losses, [mean] * count) / math.sqrt(count)
            if loss > mean + max(_SPIKE * deviation, 0.1 * abs(mean)):
                log.warning(
                    "step %d: loss spike %.4f; the previous %d steps: %.4f ± %.4f",
                    step,
                    loss,
                    len(self._losses),
                    mean,
                    deviation,
                )
        if math.isfinite(loss):
            self._losses.append(loss)
        return loss
