"""`sheepop-jax bench`: decoding speed with and without the key/value cache."""

import argparse
import sys
from pathlib import Path

from sheepop_jax.cli.common import Parser, checked_step, command, load_params, path_argument
from sheepop_jax.errors import InputError

DESCRIPTION = "Measure tokens/s and time to first token with and without the key/value cache."
EPILOG = """\
examples:
  python -m sheepop_jax bench --ckpt runs/quickstart
  python -m sheepop_jax bench --ckpt runs/base --prompt_lengths 64 256 --batch_sizes 1 8"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser("bench", DESCRIPTION, EPILOG)
    parser.add_run()
    add = parser.add_argument
    add(
        "--prompt_lengths",
        type=int,
        nargs="+",
        default=[16, 64],
        metavar="T",
        help="tokens per prompt (default 16 64)",
    )
    add(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1, 8],
        metavar="B",
        help="prompts per batch (default 1 8)",
    )
    add("--new_tokens", type=int, default=64, metavar="N", help="tokens per prompt (default 64)")
    add("--repeats", type=int, default=3, metavar="N", help="timed runs per median (default 3)")
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="directory for the JSON file and the plot (default RUN/bench)",
    )
    parser.add_debug()
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    flags = parse(argv)
    with command(flags):
        run(flags)
    return 0


def run(flags: argparse.Namespace) -> None:
    """Measures decoding, prints a table, and writes a JSON file and a plot.

    Raises:
        InputError: the run or a flag is invalid.
    """
    wanted = checked_step(flags.step)
    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)
    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.generation.benchmark import BenchmarkConfig, benchmark
    from sheepop_jax.generation.benchmark_report import format_table, write_results
    from sheepop_jax.generation.requests import resolve_context

    opened = open_run(flags.ckpt)
    context = resolve_context(opened.config.model, flags.context)
    longest = max(flags.prompt_lengths) + flags.new_tokens
    if longest > context:
        got = f"{longest} tokens with --new_tokens {flags.new_tokens}"
        raise InputError(
            "prompt_lengths", got, f"at most {context} (the context)", "a larger `context`"
        )
    out = Path(flags.out) if flags.out else opened.directory / "bench"
    if not next(path for path in (out, *out.absolute().parents) if path.exists()).is_dir():
        raise InputError("out", str(out), "a directory that can be created")  # before measuring
    params, step = load_params(opened, wanted, flags.quantize)
    dtype = machine.compute_dtype(flags.dtype)
    config = BenchmarkConfig(
        flags.prompt_lengths, flags.batch_sizes, flags.new_tokens, flags.repeats, context
    )
    model = opened.model(dtype)
    rows = benchmark(model, params, config, report=lambda line: print(line, file=sys.stderr))
    about = {
        "run": str(opened.directory),
        "step": step,
        "device": machine.device_kind,
        "dtype": dtype.name,
        "quantize": flags.quantize,
    }
    print(format_table(rows))
    for path in write_results(rows, out, about):
        print(f"written: {path}", file=sys.stderr)
