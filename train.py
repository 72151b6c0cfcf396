"""Train a language model: flags → configuration → one call into the library."""

import argparse
import sys
from pathlib import Path

from sheepop_jax.cli.common import Parser, command, load_config
from sheepop_jax.runtime import distributed

EPILOG = """\
examples:
  python train.py --config configs/quickstart.py
  python train.py --config configs/quickstart.py --config.data.path=my_texts/ --workdir runs/mine
  python train.py --config configs/base.py --config.train.num_steps=1000 --config.model.dropout=0

Every field of configs/base.py can be set as --config.section.field=value. On a workdir that already
holds the run, training goes on from the newest checkpoint. A config file is a program: run only
those that you trust.

Several processes, one a host or one a GPU, train as one: under SLURM and Open MPI by themselves,
on Cloud TPU with --coordinator_address auto, anywhere with its three flags. They share the workdir
and data.cache_dir (docs/scaling.md).

exit codes: 0 done, 1 failed, 2 bad input, 75 stopped by a signal after saving (run it again);
a second signal ends it at once: 130 or 143"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits our own flags from the overrides of configuration fields."""
    parser = Parser(
        prog="train.py",
        description="Train a decoder-only language model from raw text.",
        epilog=EPILOG,
    )
    parser.add_config()
    parser.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/NAME)")
    parser.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="of process 0, which waits there; or auto",
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="that train together")
    parser.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0 to N - 1")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and full logs")
    return parser.parse_with_overrides(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    flags, overrides = parse(argv)
    with distributed.leaving_at_once(), command(flags.debug):
        member = distributed.DistributedConfig(
            flags.coordinator_address, flags.num_processes, flags.process_id
        )
        config = load_config(flags.config, overrides)
        workdir = flags.workdir or Path("runs") / Path(flags.config).stem
        from sheepop_jax.training.signals import EXIT_STOPPED, StopRequested, StopSignal

        stop = StopSignal().install()
        from sheepop_jax.runtime import platform

        machine = platform.prepare(config.train.platform, member)
        from sheepop_jax.pipeline import train

        try:
            figures = train(config, workdir, machine, stop)
        except StopRequested:
            if distributed.is_main_process():
                print("stopped; the same command goes on from there", file=sys.stderr)
            return EXIT_STOPPED
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        if distributed.is_main_process():
            print(f"{workdir}: {shown or 'no figures: the run is beyond its last step'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
