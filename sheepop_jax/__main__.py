"""python -m sheepop_jax <command>: the tools beside train.py and sample.py."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from sheepop_jax.cli import Parser, checked_step, command, load_config
from sheepop_jax.errors import InputError, RunFailed

EPILOG = """\
examples:
  python -m sheepop_jax data --config configs/base.py --config.data.path=my_texts/
  python -m sheepop_jax evaluate --ckpt runs/quickstart
  python -m sheepop_jax evaluate --ckpt runs/base --data my_text.txt --step best --json
  python -m sheepop_jax bench --ckpt runs/base --batch_sizes 1 8
  python -m sheepop_jax checkpoints --ckpt runs/base --verify

exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C"""


DATA = """\
read a corpus, hold out a part, train the tokenizer and write the token shards that train.py will
use; then print what is in them, and windows chosen at random, to look at"""
DATA_EPILOG = """\
Every field of configs/base.py can be set as --config.section.field=value. train.py does the same
work by itself; this command is for large corpora, for several processes, and for a look.

examples:
  python -m sheepop_jax data --config configs/base.py --config.data.path=corpus.jsonl
  python -m sheepop_jax data --config configs/wikitext103.py --verify
  python -m sheepop_jax data --config configs/base.py --process_index 0 --process_count 2"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command and its flags; and, for `data`, the overrides of configuration fields."""
    parser = Parser(prog="python -m sheepop_jax", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{data,evaluate,bench,checkpoints}"
    )

    data = commands.add_parser(
        "data", help="prepare a corpus and show what is in it", description=DATA, epilog=DATA_EPILOG
    )
    data.add_config()
    data.add_argument("--windows", type=int, default=10, metavar="N", help="shown (default 10)")
    data.add_argument("--verify", action="store_true", help="compare every file with its SHA-256")
    data.add_argument("--json", action="store_true", help="print the manifest as JSON instead")
    data.add_argument("--process_index", type=int, default=0, metavar="I", help="of process_count")
    data.add_argument(
        "--process_count",
        type=int,
        default=1,
        metavar="N",
        help="processes, on one or several hosts, that share the cache directory and the work",
    )
    data.add_argument("--debug", action="store_true", help="show tracebacks and full logs")

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
    bench.add_argument(
        "--prompt_lengths", type=int, nargs="+", default=[16, 64], metavar="T", help="default 16 64"
    )
    bench.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 8], metavar="B", help="default 1 8"
    )
    bench.add_argument("--new_tokens", type=int, default=64, metavar="N", help="default 64")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="medians of (default 3)")
    bench.add_argument("--out", metavar="DIR", help="for the JSON and the plot: default RUN/bench")

    text = "list the checkpoints of a run, verify them, delete some"
    checkpoints = commands.add_parser("checkpoints", help=text, description=text)
    checkpoints.add_argument("--ckpt", required=True, metavar="RUN", help="a run directory")
    checkpoints.add_argument(
        "--verify",
        action="store_true",
        help="compare every file with its SHA-256; exit code 1 if one is damaged",
    )
    checkpoints.add_argument("--json", action="store_true", help="one JSON object a line")
    some = checkpoints.add_mutually_exclusive_group()
    some.add_argument("--delete", type=int, nargs="+", metavar="STEP", help="delete these")
    some.add_argument("--keep", type=int, nargs="+", metavar="STEP", help="delete all but these")
    checkpoints.add_argument("--debug", action="store_true", help="show tracebacks and full logs")
    if argv[:1] == ["data"]:
        return parser.parse_with_overrides(argv)
    return parser.parse_args(argv), []


def data(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Prepares the data of a configuration and prints what is in it.

    Raises:
        InputError: a flag, the configuration or the text is wrong.
    """
    if not 0 <= flags.process_index < flags.process_count:
        expected = f"at least 0 and below --process_count {flags.process_count}"
        raise InputError("--process_index", flags.process_index, expected)
    if flags.windows < 0:
        raise InputError("--windows", flags.windows, "at least 0")
    config = load_config(flags.config, overrides)
    from sheepop_jax.data.batches import Layout
    from sheepop_jax.data.prepare import prepare
    from sheepop_jax.data.report import describe, random_windows
    from sheepop_jax.data.shards import verify_shards

    prepared = prepare(config.data, flags.process_index, flags.process_count)
    if flags.verify:
        files = verify_shards(prepared.directory, prepared.manifest)
        print(f"{prepared.directory}: {files} files are what the manifest says", file=sys.stderr)
    if flags.json:
        print(json.dumps(prepared.manifest))
        return
    layout = Layout.of(config.data, prepared.tokenizer.end_of_text)
    print(describe(prepared, layout, config.seed))
    for number, text in enumerate(
        random_windows(prepared, layout, config.seed, flags.windows), start=1
    ):
        print(f"\n--- window {number} of {flags.windows} ---\n{text}")


def evaluate(flags: argparse.Namespace) -> None:
    """Evaluates a run and prints the figures.

    Raises:
        InputError: the run, the text or a flag is wrong.
    """
    if flags.batch_size < 1:
        raise InputError("--batch_size", flags.batch_size, "at least 1")
    wanted = checked_step(flags.step)
    from sheepop_jax import runtime

    machine = runtime.prepare(flags.platform)
    from sheepop_jax.data.batches import Layout
    from sheepop_jax.data.shards import TokenStream, encode_text
    from sheepop_jax.evaluation import compression_figures, evaluate_stream
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
        compressed = {"gzip_bits_per_byte": run.gzip_bits_per_byte}
    else:
        text = _read_text(flags.data)
        run.tokenizer.check(text, flags.data)
        tokens = encode_text(run.tokenizer, [text])
        stream = TokenStream.from_array(tokens, len(text.encode()), 1)
        compressed = compression_figures(text.encode())
    params, step = run.params(wanted)
    model = run.model(machine.compute_dtype(flags.dtype))
    layout = replace(Layout.of(run.config.data, run.tokenizer.end_of_text), seq_len=seq_len)
    figures = evaluate_stream(
        model,
        params,
        stream,
        layout,
        batch_size=flags.batch_size,
        overlap=flags.overlap,
    )
    found = figures.to_dict() | compressed
    if flags.json:
        print(json.dumps(found))
        return
    print(f"step {step} of {run.directory}, on {flags.data or 'its held-out split'}:")
    for name, value in found.items():
        print(f"  {name:20}{value:,}" if isinstance(value, int) else f"  {name:20}{value:.4f}")


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
    wanted = checked_step(flags.step)
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
    out = Path(flags.out) if flags.out else run.directory / "bench"
    if not next(path for path in (out, *out.absolute().parents) if path.exists()).is_dir():
        raise InputError("--out", str(out), "a directory that can be made")  # before measuring
    params, step = run.params(wanted)
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
    for path in write_results(rows, out, about):
        print(f"written: {path}", file=sys.stderr)


def checkpoints(flags: argparse.Namespace) -> None:
    """Lists the checkpoints of a run, after deleting what was asked for.

    Raises:
        InputError: not a run, a step that is not there, or no whole checkpoint would be left.
        RunFailed: with --verify, one of them is damaged.
    """
    from sheepop_jax.run import WorkdirLock, open_run
    from sheepop_jax.training.inventory import delete, inventory, keep_only, table

    run = open_run(flags.ckpt)
    if flags.delete or flags.keep:
        with WorkdirLock(run.directory):
            if flags.delete:
                delete(run.checkpoints, flags.delete)
            else:
                keep_only(run.checkpoints, flags.keep)
    items = inventory(run.checkpoints, verify=flags.verify)
    if flags.json:
        for item in items:
            print(json.dumps(item.to_dict()))
    else:
        print(table(items, verified=flags.verify))
    damaged = sum(bool(item.damage) and not item.set_aside for item in items)
    if flags.verify and damaged:
        raise RunFailed(f"{damaged} of {len(run.checkpoints.steps())} checkpoints are damaged")


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    flags, overrides = parse(argv)
    with command(flags.debug):
        match flags.command:
            case "data":
                data(flags, overrides)
            case "evaluate":
                evaluate(flags)
            case "bench":
                bench(flags)
            case "checkpoints":
                checkpoints(flags)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
