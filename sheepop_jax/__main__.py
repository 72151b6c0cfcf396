"""python -m sheepop_jax <command>: the tools beside train.py and sample.py."""

import argparse
import json
import sys
from pathlib import Path

from sheepop_jax.cli import Parser, command
from sheepop_jax.errors import InputError

EPILOG = """\
examples:
  python -m sheepop_jax evaluate --ckpt runs/quickstart
  python -m sheepop_jax evaluate --ckpt runs/base --data my_text.txt --step best --json
  python -m sheepop_jax bench --ckpt runs/base --batch_sizes 1 8

exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C"""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its flags."""
    parser = Parser(prog="python -m sheepop_jax", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{evaluate,bench}")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--ckpt", required=True, metavar="RUN", help="a run directory")
        sub.add_argument("--step", default="latest", help="latest (default), best or a number")
        sub.add_argument("--platform", choices=("auto", "cpu", "cuda", "tpu"), default="auto")
        sub.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
        sub.add_argument(
            "--context", type=int, metavar="N", help="default: the run's own; RoPE allows more"
        )
        sub.add_argument("--debug", action="store_true", help="show tracebacks and full logs")
        return sub

    evaluate = add("evaluate", "loss, perplexity, bits per byte and accuracy on held-out text")
    evaluate.add_argument(
        "--data", metavar="FILE", help="a text file; default: the run's own held-out split"
    )
    evaluate.add_argument(
        "--overlap",
        type=int,
        default=0,
        metavar="N",
        help="tokens that a window repeats from the one before, as context (default 0)",
    )
    evaluate.add_argument("--batch_size", type=int, default=8, metavar="B", help="default 8")
    evaluate.add_argument("--json", action="store_true", help="one JSON object on stdout")

    bench = add("bench", "tokens per second and time to first token, with and without the cache")
    bench.add_argument("--prompt_lengths", type=int, nargs="+", default=[16, 64], metavar="T")
    bench.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], metavar="B")
    bench.add_argument("--new_tokens", type=int, default=64, metavar="N", help="default 64")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="medians of (default 3)")
    bench.add_argument("--out", metavar="DIR", help="for the JSON and the plot: default RUN/bench")
    return parser.parse_args(argv)


def evaluate(flags: argparse.Namespace) -> None:
    """Evaluates a run and prints the figures.

    Raises:
        InputError: the run, the text or a flag is wrong.
    """
    if flags.batch_size < 1:
        raise InputError("--batch_size", flags.batch_size, "at least 1")
    from sheepop_jax import runtime

    machine = runtime.prepare(flags.platform)
    from sheepop_jax.data.shards import TokenStream, encode_text
    from sheepop_jax.evaluation import evaluate_stream
    from sheepop_jax.generation.request import resolve_context
    from sheepop_jax.run import open_run

    run = open_run(flags.ckpt)
    seq_len = run.config.data.seq_len
    if flags.context is not None:
        seq_len = resolve_context(run.config.model, flags.context)
        print(f"windows of {seq_len} tokens; trained on {run.config.data.seq_len}", file=sys.stderr)
    if not 0 <= flags.overlap < seq_len:
        raise InputError("--overlap", flags.overlap, f"at least 0 and below the window, {seq_len}")
    if flags.data is None:
        stream = run.held_out().validation
    else:
        text = _read_text(flags.data)
        run.tokenizer.check(text, flags.data)
        tokens = encode_text(run.tokenizer, [text])
        stream = TokenStream.from_array(tokens, len(text.encode()), 1)
    params, step = run.params(flags.step)
    model = run.model(machine.compute_dtype(flags.dtype))
    figures = evaluate_stream(
        model,
        params,
        stream,
        seq_len=seq_len,
        batch_size=flags.batch_size,
        overlap=flags.overlap,
    )
    if flags.json:
        print(json.dumps(figures.to_dict()))
        return
    print(f"step {step} of {run.directory}, on {flags.data or 'its held-out split'}:")
    for name, value in figures.to_dict().items():
        print(f"  {name:14}{value:,}" if isinstance(value, int) else f"  {name:14}{value:.4f}")
    if flags.data is None:
        print(f"  gzip -9 needs {run.gzip_bits_per_byte:.3f} bits per byte on the same text")


def _read_text(name: str) -> str:
    try:
        text = Path(name).read_bytes().decode()
    except OSError as error:
        raise InputError("--data", f"{name} ({error.strerror})", "a text file") from None
    except UnicodeDecodeError as error:
        got = f"{name}, not UTF-8 at byte {error.start}"
        raise InputError("--data", got, "a UTF-8 text file") from None
    if not text.strip():
        raise InputError("--data", f"{name}, without text", "a text file")
    return text


def bench(flags: argparse.Namespace) -> None:
    """Measures decoding, prints a table, and writes JSON and a plot.

    Raises:
        InputError: the run or a flag is wrong.
    """
    from sheepop_jax import runtime

    machine = runtime.prepare(flags.platform)
    from sheepop_jax.generation.bench import benchmark
    from sheepop_jax.generation.bench_report import format_table, write_results
    from sheepop_jax.generation.request import resolve_context
    from sheepop_jax.run import open_run

    run = open_run(flags.ckpt)
    context = resolve_context(run.config.model, flags.context)
    longest = max(flags.prompt_lengths) + flags.new_tokens
    if longest > context:
        got = f"{longest} tokens with --new_tokens {flags.new_tokens}"
        raise InputError("--prompt_lengths", got, f"at most the context, {context}", "--context")
    params, step = run.params(flags.step)
    dtype = machine.compute_dtype(flags.dtype)
    rows = benchmark(
        run.model(dtype),
        params,
        prompt_lengths=flags.prompt_lengths,
        batch_sizes=flags.batch_sizes,
        new_tokens=flags.new_tokens,
        repeats=flags.repeats,
        context=context,
        report=lambda line: print(line, file=sys.stderr),
    )
    about = {
        "run": str(run.directory),
        "step": step,
        "device": machine.device_kind,
        "dtype": dtype.name,
    }
    print(format_table(rows))
    out = Path(flags.out) if flags.out else run.directory / "bench"
    for path in write_results(rows, out, about):
        print(f"written: {path}", file=sys.stderr)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    flags = parse(argv)
    with command(flags.debug):
        match flags.command:
            case "evaluate":
                evaluate(flags)
            case "bench":
                bench(flags)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
