"""The log of a run: one object a line, each step once, whatever interrupted it."""

import json
import math

import pytest

from sheepop_jax.training.curve import draw_curve
from sheepop_jax.training.metrics import NAME, MetricsLog, read_metrics


def test_lines_are_json_objects_with_a_step_and_no_nan(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.5, "skipped": True})
    log.write(1, {"val_loss": 2.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.5, "skipped": True},
        {"step": 1, "val_loss": 2.5},
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_going_on_cuts_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    log = MetricsLog(tmp_path, 3)
    log.write(4, {"loss": 40.0})
    log.close()
    found = [(line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_no_log_is_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []
    assert draw_curve(tmp_path) is None


@pytest.mark.parametrize("lines", [1, 3])
def test_the_curve_is_drawn_from_few_lines_too(tmp_path, lines):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, lines + 1):
        values = {
            "loss": 3.0 / step,
            "learning_rate": 0.1,
            "grad_norm": 1.0,
            "tokens_per_second": 9,
        }
        log.write(step, values)
    log.write(lines, {"val_loss": 2.0})
    log.close()
    path = draw_curve(tmp_path)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
