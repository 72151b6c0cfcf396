"""Inference benchmark results as a Markdown table, a JSON file and a plot."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sheepop_jax.errors import InputError
from sheepop_jax.generation.benchmark import MEMORY, Row

FILES = ("inference.json", "inference.png")


def format_table(rows: Sequence[Row]) -> str:
    """Formats the rows as a Markdown table; the speed-up is relative to no cache."""
    slow = {(r.prompt_length, r.batch_size): r.tokens_per_second for r in rows if not r.cached}
    lines = [
        "| prompt | batch | new | cache | tokens/s | speed-up | first, ms | peak, MiB | agree |",
        "|--:|--:|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        ratio = r.tokens_per_second / slow[r.prompt_length, r.batch_size]
        lines.append(
            f"| {r.prompt_length} | {r.batch_size} | {r.new_tokens} "
            f"| {'yes' if r.cached else 'no'} | {r.tokens_per_second:.1f} | {ratio:.2f} "
            f"| {1e3 * r.first_token_seconds:.1f} | {r.peak_bytes / 2**20:.1f} "
            f"| {r.agreement:.1%} |"
        )
    return "\n".join([*lines, "", MEMORY])


def write_results(rows: Sequence[Row], directory: Path, about: dict[str, Any]) -> list[Path]:
    """Writes `inference.json` and `inference.png`; returns their paths.

    Args:
        rows: results of `benchmark`.
        directory: output directory; created if missing.
        about: metadata for the JSON file, such as run, step, device, dtype.

    Raises:
        InputError: the directory is not writable.
    """
    data, plot = (directory / name for name in FILES)
    content = {**about, "memory": MEMORY, "rows": [dataclasses.asdict(row) for row in rows]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _plot(rows, plot)
    except OSError as error:
        raise _not_writable(directory, error) from None
    return [data, plot]


def check_writable(directory: Path) -> None:
    """Creates the directory, and checks that `write_results` can write to it.

    Raises:
        InputError: it cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        for path in (directory / name for name in FILES):
            if path.exists():
                path.open("a").close()
    except OSError as error:
        raise _not_writable(directory, error) from None


def _not_writable(directory: Path, error: OSError) -> InputError:
    return InputError("out", f"{directory} ({error.strerror})", "a writable directory")


def _plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("tokens / s", lambda row: row.tokens_per_second),
        ("time to first token, ms", lambda row: 1e3 * row.first_token_seconds),
        ("peak memory, MiB", lambda row: row.peak_bytes / 2**20),
    )
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for i, size in enumerate(sorted({row.batch_size for row in rows})):
            for cached, line in ((True, "o-"), (False, "s--")):
                chosen = [r for r in rows if r.batch_size == size and r.cached == cached]
                chosen.sort(key=lambda row: row.prompt_length)
                name = f"batch {size}, {'with' if cached else 'without'} cache"
                lengths, values = [r.prompt_length for r in chosen], [value(r) for r in chosen]
                axes.plot(lengths, values, line, color=f"C{i}", label=name)
        axes.set(xlabel="prompt length, tokens", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=110)
