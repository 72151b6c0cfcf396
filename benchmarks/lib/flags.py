"""Command-line flags shared by the benchmarks."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.lib.report import default_out


def parser(
    doc: str, turns: int = 0, *, peers: bool = False, dtype: bool = False
) -> argparse.ArgumentParser:
    """Creates a parser with --platform, --out and optional flags.

    Args:
        doc: the help text.
        turns: default of --turns; 0 omits the flag.
        peers: whether to add --peer_python and --within.
        dtype: whether to add --dtype.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if turns:
        made.add_argument("--turns", type=int, default=turns, help=f"timed turns (default {turns})")
    if peers:
        made.add_argument(
            "--peer_python",
            default=sys.executable,
            metavar="PATH",
            help="Python interpreter with torch and transformers (default: this one; "
            "pip install -r requirements/bench.txt)",
        )
        made.add_argument(
            "--within",
            type=float,
            metavar="S",
            help="time limit per comparison in seconds: contenders not ready by then are left out, "
            "and no further turn begins (default: no limit)",
        )
    if dtype:
        made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--platform", choices=["auto", "cpu", "cuda", "tpu"], default="auto")
    made.add_argument(
        "--out",
        type=Path,
        default=default_out(),
        metavar="DIR",
        help="directory of JSON results",
    )
    return made


def absolute(path: str) -> str:
    """Makes a program's path absolute; keeps links, which identify virtual environments."""
    return os.path.abspath(path) if os.sep in path else path
