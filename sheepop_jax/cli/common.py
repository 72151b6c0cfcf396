"""What the commands share: configurations, one-line errors, exit codes, logs on stderr."""

import argparse
import contextlib
import difflib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError, RunFailed

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
PLATFORM_HELP = "where to run (default auto: the GPU or TPU that is here, or the CPU)"
DTYPE_HELP = (
    "of activations (default auto: bfloat16 on TPUs and on GPUs from Ampere on, else float32)"
)
_KINDS = {bool: "True or False", int: "a whole number, in digits", float: "a number"}
MAX_STEP_DIGITS = 18  # Python refuses to read numbers of thousands


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps its line breaks and whose errors take one line."""

    def __init__(self, **options: object):
        # The options are argparse's own, each of its type: hence the ignore.
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def add_config(self) -> None:
        """The flag that names a configuration; overrides of its fields are left over."""
        self.add_argument("--config", required=True, metavar="FILE", help="e.g. configs/base.py")

    def parse_with_overrides(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Our own flags, and the `--config.section.field=value` words."""
        flags, overrides = self.parse_known_args(argv)
        for word in overrides:
            if not word.startswith("--config."):
                self.error(f"unknown argument {word}")
            if "=" not in word:
                self.error(f"{word} has no value: write {word}=VALUE")
        return flags, overrides

    def error(self, message: str) -> NoReturn:
        """Prints `error: …` and exits with 2."""
        line = " ".join(message.split())  # an argument may hold line breaks
        print(f"error: {line}; try --help", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def checked_step(step: str) -> str | int:
    """`--step`, before there is a run to look into.

    Raises:
        InputError: neither latest, best nor a number.
    """
    if step in ("latest", "best"):
        return step
    if not (step.isascii() and step.isdigit() and len(step) <= MAX_STEP_DIGITS):
        raise InputError("--step", step, "latest, best or a number")
    return int(step)


@contextlib.contextmanager
def command(debug: bool) -> Iterator[None]:
    """Sets up logs on stderr, and turns what a user can fix into one line and an exit code.

    With `debug` tracebacks are shown and logs are full.
    """
    streams = _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    shown = "%(asctime)s %(name)s %(levelname)s %(message)s" if debug else "%(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(shown))
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:  # others' loggers speak up only when something is wrong
        logging.getLogger("sheepop_jax").setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.ERROR)
        # The hub's client logs each retry; it reads this when it is imported.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        # When one of orbax's writes fails, those beside it are reported as "never retrieved".
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        yield
        sys.stdout.flush()  # at exit, a closed pipe would be Python's own message and code
    except BrokenPipeError:
        # Whoever read our output is gone. Python flushes stdout at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        line = _explained(error)
        if debug or not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        bad_input = isinstance(error, InputError | ModuleNotFoundError)
        sys.exit(EXIT_BAD_INPUT if bad_input else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:  # whoever called us in a process of their own has logs of their own
        root.handlers[:] = before
        root.setLevel(level)
        streams.close()


def _open_closed_streams() -> contextlib.ExitStack:
    """A standard stream that was closed is None, and the next file opened would get its number."""
    opened = contextlib.ExitStack()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, opened.enter_context(open(os.devnull, mode)))
            opened.callback(setattr, sys, name, None)
    return opened


def _explained(error: Exception) -> str:
    """One line for what a user can do something about; "" for a bug."""
    match error:
        case InputError() | RunFailed():
            return str(error)
        case MemoryError():
            return f"out of memory ({error}); try smaller numbers"
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):  # jax's own class of it
            reason = str(error).splitlines()[0][:200]
            return f"out of memory ({reason}); try less at once: fewer texts, a shorter context"
        case ModuleNotFoundError():
            return (
                f"the Python package {error.name} is missing here; try ./setup.sh, and then run "
                "this with .venv/bin/python"
            )
        case OSError():
            return str(error)
    return ""


def leave_on_interrupt() -> None:
    """Makes Ctrl-C end the program at once with 130, also while XLA compiles or decodes.

    For programs that have nothing to save. A Python signal handler waits until compiled code
    returns; a thread on the wake-up descriptor does not.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)

    def wait() -> None:
        while os.read(read_end, 1) != bytes([signal.SIGINT]):
            pass
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def load_config(path: str, overrides: list[str]) -> Config:
    """Runs a config file, applies `--config.section.field=value` overrides, and validates.

    Raises:
        InputError: the file or a field is wrong; names it.
    """
    from absl import flags as absl_flags
    from ml_collections import ConfigDict, config_flags

    def load(argv: list[str]) -> ConfigDict:
        values = absl_flags.FlagValues()
        argv = ["program", f"--config={path}", *argv]
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        return holder.value

    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        files = ", ".join(sorted(map(str, Path("configs").glob("*.py"))))
        raise InputError("--config", path, "a config file", files)
    try:
        plain = load([])
        if not isinstance(plain, ConfigDict):
            raise TypeError(f"it gives {plain!r}, not a ConfigDict")
    except (Exception, SystemExit) as error:  # a config file is a program, and may fail in any way
        cause: BaseException | None = error
        if isinstance(error, absl_flags.Error):  # wrapped by absl, and with a traceback as its text
            while cause and (cause is error or "Traceback (most" in str(cause)):
                cause = cause.__context__
        got = f"{type(cause).__name__}: {cause}" if cause else "it fails"
        raise InputError("--config", path, f"a file whose get_config() works ({got})") from error
    known = [name for name, _ in _flatten(plain)]
    for override in overrides:
        name, _, value = override.removeprefix("--config.").partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"--config.{near[0]}" if near else "one of those in configs/base.py"
            inside = [field for field in known if field.startswith(f"{name}.")]
            if inside:
                hint = f"one of those in it, such as --config.{inside[0]}"
            raise InputError(f"--config.{name}", value, "a field of the configuration", hint)
    try:
        return Config.from_dict(load(overrides))
    except (absl_flags.Error, ValueError, TypeError):
        for override in overrides:  # one of them is the culprit
            name, _, value = override.removeprefix("--config.").partition("=")
            try:
                load([override])
            except (absl_flags.Error, ValueError, TypeError):
                kind = type(dict(_flatten(plain))[name])
                expected = _KINDS.get(kind, f"a value of type {kind.__name__}")
                raise InputError(name, value, expected) from None
        raise


def _flatten(config: Any, prefix: str = "") -> list[tuple[str, object]]:
    fields: list[tuple[str, object]] = []
    for name, value in config.items():
        is_section = hasattr(value, "items")
        fields += _flatten(value, f"{prefix}{name}.") if is_section else [(prefix + name, value)]
    return fields
