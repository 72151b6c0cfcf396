"""Benchmark output: a Markdown table on stdout and a JSON file."""

import json
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.lib.contest import ROOT, say

LIBRARIES = ("jax", "flax", "optax", "torch", "transformers")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table; columns are the keys, numbers are right-aligned."""
    names = list(rows[0])
    right = [all(isinstance(row[name], int | float | None) for row in rows) for name in names]
    lines = [names, ["--:" if r else ":--" for r in right]]
    lines += [[_cell(row[name]) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def publish(name: str, rows: Sequence[dict[str, Any]], about: dict[str, Any], out: Path) -> None:
    """Prints the table, and writes it to `out/NAME.json` with date, versions and `about`."""
    circumstances = {"date": date.today().isoformat(), **versions(), **about}
    print(table(rows))
    print("\n" + ", ".join(f"{key} {_cell(value)}" for key, value in circumstances.items()))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"about": circumstances, "rows": rows}, indent=1) + "\n")
    say(f"written: {path}")


def versions() -> dict[str, str]:
    """Returns the versions of the installed libraries."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def default_out() -> Path:
    """The default directory of results, ignored by git."""
    return ROOT / "benchmarks" / "results"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
