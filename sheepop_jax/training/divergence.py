"""What is watched in the numbers of each step: skipped updates, and spikes of the loss."""

import collections
import logging
import math
import statistics

from sheepop_jax.errors import RunFailed
from sheepop_jax.training.step import StepMetrics

log = logging.getLogger(__name__)

_WINDOW = 200  # steps that a spike is compared with
_ENOUGH = 20  # steps before anything is called a spike
_SPIKE = 6.0  # standard deviations above the mean


class TrainingDiverged(RunFailed):
    """Too many updates in a row had gradients that cannot be used."""


class DivergenceMonitor:
    """Looks at the numbers of every step of one process."""

    def __init__(self, max_skipped_steps: int):
        self._max_skipped = max_skipped_steps
        self._skipped_in_a_row = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    @property
    def streak(self) -> int:
        """Updates skipped in a row, up to the last one looked at."""
        return self._skipped_in_a_row

    def look(self, step: int, metrics: StepMetrics) -> None:
        """Waits for a step, and says what is wrong with it.

        Raises:
            TrainingDiverged: `train.max_skipped_steps` updates in a row were skipped.
        """
        # No more than is looked at: each number that is fetched costs the loop time.
        loss = metrics.loss.item()
        if metrics.skipped.item():
            self._skipped_in_a_row += 1
            norm = float(metrics.grad_norm)
            finite = math.isfinite(norm) and math.isfinite(loss)
            why = f"their norm {norm:.3g} is an outlier" if finite else "they are not finite"
            log.warning("step %d skipped for its gradients: %s", step, why)
            if self._skipped_in_a_row >= self._max_skipped:
                raise TrainingDiverged(
                    f"{self._skipped_in_a_row} updates in a row skipped, the last at step {step}, "
                    f"for their gradients ({why}); lower optimizer.learning_rate, or look at the "
                    "data"
                )
            return
        self._skipped_in_a_row = 0
        if len(self._losses) >= _ENOUGH:
            mean, count = statistics.fmean(self._losses), len(self._losses)
            # Not statistics.pstdev: it sums exact fractions, for a tenth of a millisecond a step.
            deviation = math.dist(self._losses, [mean] * count) / math.sqrt(count)
            if loss > mean + max(_SPIKE * deviation, 0.1 * abs(mean)):
                log.warning(
                    "step %d: loss %.4f, a spike: the %d steps before it had %.4f ± %.4f",
                    step,
                    loss,
                    len(self._losses),
                    mean,
                    deviation,
                )
        if math.isfinite(loss):
            self._losses.append(loss)
