"""The flags that the benchmarks share."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.lib.report import default_out


def parser(
    doc: str, turns: int = 0, *, peers: bool = False, dtype: bool = False
) -> argparse.ArgumentParser:
    """With --platform and --out, and of --turns, --peer_python and --dtype what is asked for.

    Args:
        doc: becomes the help.
        turns: the default of --turns; 0 for none.
        peers: whether torch takes part; then there is --within too.
        dtype: whether both can be measured.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if turns:
        made.add_argument("--turns", type=int, default=turns, help=f"timed (default {turns})")
    if peers:
        made.add_argument(
            "--peer_python",
            default=sys.executable,
            metavar="PATH",
            help="the interpreter that has torch and transformers (default: this one; "
            "pip install -r requirements/bench.txt)",
        )
        made.add_argument(
            "--within",
            type=float,
            metavar="S",
            help="seconds for each contest: who is not ready by then is left out, and no further "
            "turn begins (default: no limit)",
        )
    if dtype:
        made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--platform", choices=["auto", "cpu", "cuda", "tpu"], default="auto")
    made.add_argument(
        "--out", type=Path, default=default_out(), metavar="DIR", help="where the JSON goes"
    )
    return made


def absolute(path: str) -> str:
    """A program's path from the root; links stay, since a virtual environment is known by one."""
    return os.path.abspath(path) if os.sep in path else path
