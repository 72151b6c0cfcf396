"""Plots `training_curve.png` from a run's log: loss, learning rate, gradient norm, throughput."""

import logging
from pathlib import Path
from typing import Any

from sheepop_jax.training.metrics import read_metrics

log = logging.getLogger(__name__)

NAME = "training_curve.png"


def _log_ticks(low: float, high: float) -> Any:
    """Labelled ticks of a logarithmic axis that do not overlap, however many decades it spans."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    ratio = high / low
    if ratio < 10:
        return MaxNLocator(6, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,))


def draw_curve(directory: Path) -> Path | None:
    """Plots a run's curve and returns its path; None if nothing was logged or writing failed."""
    # Figure instead of pyplot, which keeps global state and may need a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    lines = read_metrics(directory)
    train = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
    if not train and not validation:
        return None

    def column(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    panels = (
        (
            axes[0, 0],
            (("loss", train, "training"), ("val_loss", validation, "validation")),
            "loss, nats",
        ),
        (axes[0, 1], (("learning_rate", train, ""),), "learning rate"),
        (axes[1, 0], (("grad_norm", train, ""),), "gradient norm, before clipping"),
        (axes[1, 1], (("tokens_per_second", train, ""),), "tokens per second"),
    )
    raw = column(train, "step_loss")
    axes[0, 0].plot(*raw, ".", color="C0", alpha=0.25, markersize=3)  # behind the mean
    for axis, curves, title in panels:
        for key, rows, label in curves:
            marker = "o" if len(rows) < 2 or key == "val_loss" else ""
            axis.plot(*column(rows, key), label=label, linewidth=1.5, marker=marker, markersize=4)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(frameon=False, loc="upper right")  # "best" is slow with many points
    if any(loss > 0 for loss in column(train, "loss")[1] + column(validation, "val_loss")[1]):
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set_major_locator(_log_ticks(*axes[0, 0].get_ylim()))
        axes[0, 0].yaxis.set_minor_locator(NullLocator())
    axes[0, 0].yaxis.set_major_formatter("{x:.6g}")
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axis in axes[1]:
        axis.set_xlabel("step")
        axis.axhline(0, alpha=0)  # so that the margin above the curve is a part of its height
        axis.set_ylim(bottom=0)
    path = directory / NAME
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:  # a failed plot must not end the run
        log.warning("%s: not written (%s)", path, error.strerror)
        return None
    return path
