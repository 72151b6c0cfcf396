"""python -m sheepop_jax <command>: the tools beside train.py and sample.py, and their flags."""

import argparse
import sys

from sheepop_jax import commands
from sheepop_jax.cli.common import DTYPE_HELP, PLATFORM_HELP, Parser, command, leave_on_interrupt
from sheepop_jax.config.schema import DTYPES, PLATFORMS

EPILOG = """\
examples:
  python -m sheepop_jax data --config configs/base.py --config.data.path=my_texts/
  python -m sheepop_jax plan --config configs/gpt2_124m.py --devices 8 --device H100
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
work by itself; this command prepares a large corpus ahead of a run, and shows what is in one.
--process_index and --process_count let a launcher start it in several processes: whichever comes
first prepares, the others wait for it and report the same shards. They do not share the work.

examples:
  python -m sheepop_jax data --config configs/base.py --config.data.path=corpus.jsonl
  python -m sheepop_jax data --config configs/wikitext103.py --verify"""


PLAN = """\
say what a run will need, before anything is compiled and without reading data: parameters, bytes on
each device, FLOPs and expected time of an update, and what to change when it does not fit"""
PLAN_EPILOG = """\
Every field of configs/base.py can be set as --config.section.field=value. Without --device, for the
devices that are here. The formula is in docs/scaling.md.

examples:
  python -m sheepop_jax plan --config configs/base.py
  python -m sheepop_jax plan --config configs/gpt2_124m.py --devices 32 --device "TPU v5p"
  python -m sheepop_jax plan --config configs/base.py --device H100 --json"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command and its flags; for `data` and `plan`, the overrides of configuration fields."""
    parser = Parser(prog="python -m sheepop_jax", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{data,plan,evaluate,bench,checkpoints}"
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
        help="processes that share data.cache_dir: one prepares, the others wait (default 1)",
    )
    data.add_argument("--debug", action="store_true", help="show tracebacks and full logs")

    plan = commands.add_parser(
        "plan", help="say what a run will need", description=PLAN, epilog=PLAN_EPILOG
    )
    plan.add_config()
    plan.add_argument("--devices", type=int, metavar="N", help="default: those here, or 1")
    plan.add_argument("--device", metavar="KIND", help="H100, TPU v5p, cpu, …; default: those here")
    plan.add_argument(
        "--vocab_size", type=int, metavar="V", help="the tokenizer's; default: data.vocab_size"
    )
    plan.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="X",
        help="model FLOPs utilization to expect: a share of the devices' peak (default 0.4)",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    plan.add_argument("--debug", action="store_true", help="show tracebacks and full logs")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--ckpt", required=True, metavar="RUN", help="a run directory")
        sub.add_argument("--step", default="latest", help="latest (default), best or a number")
        sub.add_argument("--platform", choices=PLATFORMS, default="auto", help=PLATFORM_HELP)
        sub.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
        sub.add_argument(
            "--quantize", choices=("int8",), help="weights as int8 (default: as they were trained)"
        )
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
    if argv[:1] in (["data"], ["plan"]):
        return parser.parse_with_overrides(argv)
    return parser.parse_args(argv), []


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code. `argv` defaults to the flags of this process."""
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] not in (["data"], ["evaluate"]):  # which delete what they have half read
            leave_on_interrupt()
    flags, overrides = parse(argv)
    with command(flags.debug):
        match flags.command:
            case "data":
                commands.data(flags, overrides)
            case "plan":
                commands.plan(flags, overrides)
            case "evaluate":
                commands.evaluate(flags)
            case "bench":
                commands.bench(flags)
            case "checkpoints":
                commands.checkpoints(flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
