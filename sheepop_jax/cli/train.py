"""`train.py`: train a language model or resume a run."""

import argparse
import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sheepop_jax.cli.common import Parser, best_before_latest, command, explained, path_argument
from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.runtime import distributed, streams
from sheepop_jax.training.run_log import RunLog, only_in_file

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
again to resume), 130 or 143 stopped immediately by a second SIGINT or SIGTERM"""


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
    return parser.parse_with_overrides(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the flags `argv` (None: `sys.argv`); returns the exit code."""
    streams.never_fail()
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    with distributed.leaving_at_once(), command(flags), _recorded(flags) as run_log:
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
            figures = train(config, workdir, machine, stop, run_log.open)
        except StopRequested:
            _tell("stopped; run the same command again to resume", sys.stderr)
            return EXIT_STOPPED
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        if distributed.is_main_process():
            from sheepop_jax.checkpoint.checkpoints import Checkpoints

            if note := best_before_latest(Checkpoints(Path(workdir) / "checkpoints")):
                _tell(note, sys.stderr)
        _tell(f"{workdir}: {shown or 'no metrics: the run is past its last step'}", sys.stdout)
    return 0


def _tell(line: str, stream: TextIO) -> None:
    """Prints a line of the main process and adds it to the log of the run."""
    if distributed.is_main_process():
        print(line, file=stream, flush=True)
        only_in_file.info("%s", line)


@contextlib.contextmanager
def _recorded(flags: argparse.Namespace) -> Iterator[RunLog]:
    """Keeps the log of the run, with the error that ends it."""
    with RunLog() as run_log:
        try:
            yield run_log
        except Exception as error:
            line = explained(error, set(vars(flags)))
            only_in_file.info("error: %s", line or "", exc_info=None if line else error)
            if isinstance(error, BrokenPipeError):
                # Not the reader of the log, which `command` would take it for.
                raise RunFailed(line) from error
            raise


def choose(flags: argparse.Namespace, overrides: list[str]) -> tuple[Config, Path]:
    """Returns the configuration and the run directory."""
    from sheepop_jax.config.loading import default_workdir, load_config, load_saved_config

    if flags.config is not None:
        config = load_config(flags.config, overrides, flags.workdir)
        return config, Path(flags.workdir or default_workdir(flags.config, config))
    if flags.workdir is None:
        expected = "a config file or a preset, or the `workdir` of a run to resume"
        raise InputError("config", "nothing", expected, "--config quickstart")
    return load_saved_config(flags.workdir, overrides), Path(flags.workdir)
