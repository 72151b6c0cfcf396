"""Skipped updates and spikes, in the order in which a run sees them."""

import logging

import numpy as np
import pytest

from sheepop_jax.training.divergence import DivergenceMonitor, TrainingDiverged
from sheepop_jax.training.step import StepMetrics


def metrics(loss=2.0, grad_norm=1.0, skipped=False):
    return StepMetrics(np.float32(loss), np.float32(grad_norm), 0.1, 9.0, np.bool_(skipped))


def test_skipped_updates_are_said_and_counted_in_a_row(caplog):
    health = DivergenceMonitor(max_skipped_steps=3)
    bad = [metrics(np.nan, np.nan, True), metrics(2.0, np.inf, True), metrics(2.0, 77.0, True)]
    health.look(1, bad[0])
    health.look(2, bad[1])
    health.look(3, metrics())  # the row ends
    health.look(4, bad[0])
    health.look(5, bad[1])
    assert len(caplog.records) == 4
    assert all("non-finite gradients" in record.message for record in caplog.records)
    with pytest.raises(TrainingDiverged, match=r"3 consecutive.* at step 6.*77 is an out"):
        health.look(6, bad[2])


def test_a_spike_is_said_once_there_is_something_to_compare_with(caplog):
    draw = np.random.default_rng(0)
    health = DivergenceMonitor(3)
    health.look(0, metrics(50.0))  # nothing to compare with
    assert not caplog.records
    health = DivergenceMonitor(3)
    for step in range(30):
        health.look(step, metrics(3.0 + 0.1 * draw.standard_normal()))
    health.look(30, metrics(3.3))
    assert not caplog.records
    health.look(31, metrics(5.0))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "step 31: loss spike 5.0000; the previous 31 steps: 2.9979" in record.message


def test_what_was_skipped_is_no_part_of_the_comparison(caplog):
    health = DivergenceMonitor(9)
    for step in range(25):
        health.look(step, metrics(3.0))
        if step % 5 == 0:
            health.look(step, metrics(1000.0, np.inf, skipped=True))
    caplog.clear()
    health.look(30, metrics(3.2))  # above the mean, but not by a tenth of it
    assert not caplog.records
    health.look(31, metrics(3.9))
    assert "loss spike" in caplog.text
