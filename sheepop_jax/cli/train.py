"""`train.py`: train a language model or resume a run."""

import argparse
import functools
import logging
import sys
from pathlib import Path

from sheepop_jax.cli.common import Parser, best_before_latest, command, path_argument
from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError
from sheepop_jax.runtime import distributed

log = logging.getLogger(__name__)

EPILOG = """\
examples:
  python train.py --config configs/quickstart.py
  python train.py --config configs/quickstart.py --config.data.path=my_texts/ --workdir runs/mine
  python train.py --workdir runs/mine
  python train.py --workdir runs/mine --config.train.num_steps=3000

Every field of configs/base.py can be set as --config.section.field=value. If the workdir contains a
run, training resumes from its latest checkpoint. Without --config, it uses the configuration saved
there, changed by the flags; with --config, it uses that configuration and logs each difference.
Config files are executed: run only trusted ones.

Multi-process training uses one process per host or per GPU. SLURM and Open MPI are detected
automatically; on Cloud TPU, set --coordinator_address auto; elsewhere, set --coordinator_address,
--num_processes and --process_id. All processes share the workdir and data.cache_dir
(docs/scaling.md).

exit codes: 0 done, 1 failed, 2 bad input, 75 stopped by a signal after saving (run the same command
again to resume), 130 or 143 stopped immediately by a second signal"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags and the configuration overrides."""
    parser = Parser("train.py", "Train a decoder-only language model from raw text.", EPILOG)
    parser.add_config(required=False)
    parser.add_argument(
        "--workdir",
        type=path_argument,
        metavar="DIR",
        help="run directory (default: runs/CONFIG, or runs/CONFIG-TEXT for a text of your own)",
    )
    parser.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="address of process 0, or auto",
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="number of processes")
    parser.add_argument(
        "--process_id", type=int, metavar="I", help="index of this process, from 0 to N - 1"
    )
    parser.add_debug()
    return parser.parse_with_overrides(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the flags `argv` (None: `sys.argv`); returns the exit code."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    with distributed.leaving_at_once(), command(flags):
        member = distributed.DistributedConfig(
            flags.coordinator_address, flags.num_processes, flags.process_id
        )
        config, workdir = choose(flags, overrides)
        from sheepop_jax.training.signals import EXIT_STOPPED, StopRequested, StopSignal

        stop = StopSignal().install()
        from sheepop_jax.runtime import platform

        connect = functools.partial(distributed.initialize, member)
        machine = platform.prepare(config.train.platform, connect)
        if flags.config is None:
            log.info("configuration: the one saved in %s", workdir)
        if flags.workdir is None:
            log.info("run directory: %s", workdir)
        from sheepop_jax.pipeline import train

        try:
            figures = train(config, workdir, machine, stop)
        except StopRequested:
            if distributed.is_main_process():
                print("stopped; run the same command again to resume", file=sys.stderr)
            return EXIT_STOPPED
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        if distributed.is_main_process():
            from sheepop_jax.checkpoint.checkpoints import Checkpoints

            if note := best_before_latest(Checkpoints(Path(workdir) / "checkpoints")):
                print(note, file=sys.stderr)
            print(f"{workdir}: {shown or 'no metrics: the run is past its last step'}")
    return 0


def choose(flags: argparse.Namespace, overrides: list[str]) -> tuple[Config, Path]:
    """Returns the configuration and the run directory."""
    from sheepop_jax.config.loading import default_workdir, load_config, load_saved_config

    if flags.config is not None:
        config = load_config(flags.config, overrides)
        return config, Path(flags.workdir or default_workdir(flags.config, config))
    if flags.workdir is None:
        expected = "a config file or a preset, or the `workdir` of a run to resume"
        raise InputError("config", "nothing", expected, "--config quickstart")
    return load_saved_config(flags.workdir, overrides), Path(flags.workdir)
