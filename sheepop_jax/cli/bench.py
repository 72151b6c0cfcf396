"""`sheepop-jax bench`: decoding speed with and without the key/value cache."""

import argparse
import sys
from pathlib import Path

from sheepop_jax.cli.common import Parser, checked_step, load_params, path_argument
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
        metavar="T",
        help="tokens per prompt (default 16 64, or what fits in the context)",
    )
    add(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1, 8],
        metavar="B",
        help="prompts per batch (default 1 8)",
    )
    add(
        "--new_tokens",
        type=int,
        metavar="N",
        help="tokens to generate per prompt (default 64, or at most half the context)",
    )
    add("--repeats", type=int, default=3, metavar="N", help="timed runs per median (default 3)")
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="directory for the JSON file and the plot (default RUN/bench)",
    )
    return parser.parse(argv)


def sizes(
    prompt_lengths: list[int] | None, new_tokens: int | None, context: int
) -> tuple[list[int], int]:
    """Tokens per prompt and new tokens: those given, and defaults that fit in the context."""
    longest = max(prompt_lengths or [1])
    if new_tokens is None:
        new_tokens = max(1, min(64, context // 2 if prompt_lengths is None else context - longest))
    if prompt_lengths is None:
        room = max(1, context - new_tokens)
        prompt_lengths = [length for length in (16, 64) if length <= room] or [room]
    return prompt_lengths, new_tokens


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
    from sheepop_jax.generation.benchmark_report import check_writable, format_table, write_results
    from sheepop_jax.generation.requests import resolve_context

    opened = open_run(flags.ckpt)
    context = resolve_context(opened.config.model, flags.context)
    prompt_lengths, new_tokens = sizes(flags.prompt_lengths, flags.new_tokens, context)
    longest = max(prompt_lengths) + new_tokens
    if longest > context:
        got = f"{longest} tokens with --new_tokens {new_tokens}"
        raise InputError(
            "prompt_lengths", got, f"at most {context} (the context)", "a larger `context`"
        )
    config = BenchmarkConfig(prompt_lengths, flags.batch_sizes, new_tokens, flags.repeats, context)
    config.check(context)
    params, step = load_params(opened, wanted, flags.quantize)
    out = Path(flags.out) if flags.out else opened.directory / "bench"
    check_writable(out)
    dtype = machine.compute_dtype(flags.dtype)
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
