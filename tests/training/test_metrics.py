"""The log of a run: one object per line, each step once, whatever interrupted it."""

import json
import math
import shutil

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sheepop_jax.training.curve import _log_ticks, draw_curve
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
    assert len(list((tmp_path / "tensorboard").glob("*/events.*"))) == 2


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


def tensorboard_events(directory):
    """All events of all files, in order: each is its length, a CRC, a protocol buffer, a CRC."""
    events = []
    for path in sorted((directory / "tensorboard").glob("*/events.*")):
        content = path.read_bytes()
        while content:
            end = 12 + int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12:end]))
            content = content[end + 4 :]
    return events


def test_tensorboard_has_both_kinds_of_lines_and_forgets_what_is_cut(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(3, {"loss": 2.0, "grad_norm": math.nan})
    log.write(3, {"val_loss": 2.5})
    log.write_sample(3, "a\n*b*")
    log.close()
    events = tensorboard_events(tmp_path)
    *numbers, sample = [(e.step, v) for e in events for v in e.summary.value]
    found = [(step, v.tag, v.simple_value) for step, v in numbers]
    assert found == [(3, "loss", 2.0), (3, "loss", 2.5)]  # one tag of two runs: one chart
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == {"train", "val"}
    assert sample[1].metadata.plugin_data.plugin_name == "text"
    assert sample[1].tensor.string_val == [b"    a\n    *b*"]
    shutil.rmtree(tmp_path / "tensorboard")
    MetricsLog(tmp_path, 2).close()
    starts = [e.step for e in tensorboard_events(tmp_path) if e.HasField("session_log")]
    assert starts == [3, 3]  # TensorBoard drops what older files have from this step on


def test_a_flushed_line_is_in_the_file(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 2.0})
    log.flush()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    log.close()


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


@pytest.mark.parametrize("span", [1.0001, 1.3, 3, 9.9, 10, 50, 900, 1e4, 1e10])
def test_labels_of_the_loss_do_not_overlap(span):
    """At least two labels, apart by more than their height, whatever the loss spans."""
    from matplotlib.figure import Figure

    low = 3.3e-3
    axis = Figure().subplots()
    axis.set_yscale("log")
    axis.set_ylim(low, low * span)
    axis.yaxis.set_major_locator(_log_ticks(low, low * span))
    places = np.log([tick for tick in axis.get_yticks() if low <= tick <= low * span])
    assert len(places) >= 2
    assert (np.diff(places) / np.log(span) > 1 / 25).all()  # the panel has 25 lines of text


def test_a_full_disk_names_the_log_and_closing_hides_no_other_error(tmp_path, caplog):
    """/dev/full stands for the disk."""
    log = MetricsLog(tmp_path, 0)
    log._file.close()
    log._file = open("/dev/full", "w")
    log.write(1, {"loss": 2.0})
    with pytest.raises(OSError, match=r"No space left on device; .* MB free.*metrics.jsonl"):
        log.flush()
    log.close()
    assert "metrics.jsonl: last lines not written (No space" in caplog.text


def test_tensorboard_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    log = MetricsLog(tmp_path, 0)
    log._events["train"]._file.close()
    log._events["train"]._file._writer = open("/dev/full", "wb")
    for step in range(1, 30):
        log.write(step, {"loss": 2.0})
        log.flush()
    log.close()
    assert caplog.text.count("train: TensorBoard logging disabled (No space left on device)") == 1
    assert len(read_metrics(tmp_path)) == 29


def test_no_place_for_tensorboard_is_a_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 2.0})
    log.flush()
    log.close()
    assert "TensorBoard logging disabled" in caplog.text
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_line_with_bytes_that_are_no_text_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"ste\xff": 2}\n{"step": 3}\n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_a_loss_of_nothing_is_drawn(tmp_path):
    """Of a vocabulary of one token; a logarithmic axis cannot show it, and warns."""
    figures = {"learning_rate": 1e-3, "grad_norm": 0.0, "tokens_per_second": 9.0}
    for loss in (0.0, None):  # None: not finite
        (tmp_path / NAME).write_text(json.dumps({"step": 1, "loss": loss, **figures}) + "\n")
        assert draw_curve(tmp_path)


def test_an_evaluation_that_is_not_in_the_checkpoint_is_cut_away(tmp_path):
    lines = [{"step": 2, "val_loss": 1.0}, {"step": 3, "loss": 2.0}, {"step": 3, "val_loss": 1.0}]
    for evaluated, kept in ((True, lines), (False, lines[:2])):
        (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        MetricsLog(tmp_path, 3, evaluated).close()
        assert read_metrics(tmp_path) == kept
