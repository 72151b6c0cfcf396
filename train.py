"""Train a language model: flags → configuration → one call into the library."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from sheepop_jax.cli import EXIT_FAILED, Parser, command
from sheepop_jax.config import Config
from sheepop_jax.errors import InputError

EPILOG = """\
examples:
  python train.py --config configs/quickstart.py
  python train.py --config configs/quickstart.py --config.data.path=my_texts/ --workdir runs/mine
  python train.py --config configs/base.py --config.train.num_steps=1000 --config.model.dropout=0

Every field of configs/base.py can be set as --config.section.field=value. On a workdir that already
holds the run, training goes on from the newest checkpoint. A config file is a program: run only
those that you trust.

exit codes: 0 done, 1 failed, 2 bad input, 75 stopped by a signal after saving (run it again)"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits our own flags from the overrides of configuration fields."""
    parser = Parser(
        prog="train.py",
        description="Train a decoder-only language model from raw text.",
        epilog=EPILOG,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="e.g. configs/base.py")
    parser.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/NAME)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and full logs")
    flags, overrides = parser.parse_known_args(argv)
    for word in overrides:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
        if "=" not in word:
            parser.error(f"{word} has no value: write {word}=VALUE")
    return flags, overrides


def load_config(path: str, overrides: list[str]) -> Config:
    """Runs a config file, applies `--config.section.field=value` overrides, and validates.

    Raises:
        InputError: the file or a field is wrong; names it.
    """
    from absl import flags as absl_flags
    from ml_collections import ConfigDict, config_flags

    def load(argv: list[str]) -> ConfigDict:
        values = absl_flags.FlagValues()
        argv = ["train.py", f"--config={path}", *argv]
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        return holder.value

    if not Path(path).is_file():
        files = ", ".join(sorted(map(str, Path("configs").glob("*.py"))))
        raise InputError("--config", path, "a config file", files)
    try:
        plain = load([])
    except Exception as error:  # a config file is a program, and may fail in any way
        got = f"{type(error).__name__}: {error}"
        raise InputError("--config", path, f"a file whose get_config() works ({got})") from error
    known = [name for name, _ in _flatten(plain)]
    for override in overrides:
        name, _, value = override.removeprefix("--config.").partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"--config.{near[0]}" if near else "one of those in configs/base.py"
            raise InputError(f"--config.{name}", value, "a field of the configuration", hint)
        try:
            load([override])
        except (absl_flags.Error, ValueError, TypeError):
            kind = type(dict(_flatten(plain))[name]).__name__
            raise InputError(name, value, f"a value of type {kind}") from None
    return Config.from_dict(load(overrides))


def _flatten(config: Any, prefix: str = "") -> list[tuple[str, object]]:
    fields: list[tuple[str, object]] = []
    for name, value in config.items():
        is_section = hasattr(value, "items")
        fields += _flatten(value, f"{prefix}{name}.") if is_section else [(prefix + name, value)]
    return fields


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    flags, overrides = parse(argv)
    with command(flags.debug):
        config = load_config(flags.config, overrides)
        workdir = flags.workdir or Path("runs") / Path(flags.config).stem
        from sheepop_jax.training.stop import EXIT_STOPPED, StopRequested, StopSignal

        stop = StopSignal().install()
        from sheepop_jax import runtime

        machine = runtime.prepare(config.train.platform)
        from sheepop_jax.pipeline import train
        from sheepop_jax.training.checkpoint import SaveFailed
        from sheepop_jax.training.trainer import TrainingDiverged

        try:
            figures = train(config, workdir, machine, stop)
        except StopRequested:
            return EXIT_STOPPED
        except (TrainingDiverged, SaveFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
    shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{workdir}: {shown or 'no figures: the run is beyond its last step'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
