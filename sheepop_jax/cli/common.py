"""Shared by the commands: flags, one-line errors, exit codes, logging to stderr."""

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from sheepop_jax.config.schema import DTYPES, PLATFORMS
from sheepop_jax.errors import InputError, MaskingFormatter, RunFailed, masked

if TYPE_CHECKING:  # these import jax
    from sheepop_jax.checkpoint.checkpoints import Checkpoints
    from sheepop_jax.checkpoint.run import Run

log = logging.getLogger(__name__)

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
PLATFORM_HELP = "device platform (default auto: a GPU or TPU if available, else the CPU)"
DTYPE_HELP = (
    "dtype of activations (default auto: bfloat16 on TPUs and GPUs since Ampere, else float32)"
)
STEP_HELP = (
    "checkpoint: best, latest or a step number (default: the best by validation loss, or the "
    "latest if none was evaluated)"
)
MAX_STEP_DIGITS = 18  # int() raises for strings of thousands of digits


class Parser(argparse.ArgumentParser):
    """An argument parser with preformatted help and one-line errors."""

    def __init__(self, name: str, description: str, epilog: str):
        """Creates a parser; `name` is a command or a script such as `train.py`."""
        super().__init__(
            prog=name if name.endswith(".py") else f"python -m sheepop_jax {name}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_config(self, required: bool = True) -> None:
        """Adds `--config`; `parse_with_overrides` collects the field overrides."""
        text = "config file, e.g. configs/base.py, or preset name, e.g. quickstart"
        if not required:
            text += " (default: the configuration saved in --workdir)"
        self.add_argument("--config", required=required, metavar="FILE", help=text)

    def add_run(self) -> None:
        """Adds the flags that select a run and how its model is loaded."""
        add = self.add_argument
        self.add_ckpt()
        add("--step", help=STEP_HELP)
        add("--context", type=int, metavar="N", help="default: model.max_seq_len of the run")
        add("--platform", choices=PLATFORMS, default="auto", help=PLATFORM_HELP)
        add("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
        add("--quantize", choices=("int8",), help="quantize the weights (default: off)")

    def add_ckpt(self) -> None:
        """Adds `--ckpt`."""
        text = "run directory written by train.py"
        self.add_argument("--ckpt", required=True, type=path_argument, metavar="RUN", help=text)

    def _add_debug(self) -> None:
        self.add_argument("--debug", action="store_true", help="show tracebacks and full logs")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parses the flags, with `--debug` as the last one."""
        self._add_debug()
        return self.parse_args(argv)

    def parse_with_overrides(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Like `parse`; turns `--config.section.field=value` into `section.field=value`."""
        self._add_debug()
        flags, overrides = self.parse_known_args(argv)
        for word in overrides:
            if not word.startswith("--config."):
                self.error(f"unknown argument {word}")
            if "=" not in word:
                self.error(f"{word} has no value: write {word}=VALUE")
        return flags, [word.removeprefix("--config.") for word in overrides]

    def error(self, message: str) -> NoReturn:
        """Prints `error: …` and exits with 2."""
        line = masked(" ".join(message.split()))  # an argument may contain line breaks
        print(f"error: {line}; try --help", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def path_argument(text: str) -> str:
    """The type of flags that hold a path; rejects an empty one, such as of an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("got ''; expected a path")
    return text


def checked_step(step: str | None) -> str | int | None:
    """Validates `--step` before the run is opened.

    Raises:
        InputError: the value is neither latest, best nor a number.
    """
    if step is None or step in ("latest", "best"):
        return step
    if not (step.isascii() and step.isdigit() and len(step) <= MAX_STEP_DIGITS):
        raise InputError("step", step, "latest, best or a number")
    return int(step)


def load_params(run: "Run", step: str | int | None, quantize: Any) -> tuple[Any, int]:
    """Loads the parameters of `--step` (None: the default), and logs which checkpoint it is.

    Raises:
        InputError: the checkpoint does not exist or is damaged.
    """
    params, found = run.params(step, quantize)
    log.info("step %d of %s", found, run.directory)
    if step is None and (note := best_before_latest(run.checkpoints)):
        log.info("%s", note)
    return params, found


def best_before_latest(checkpoints: "Checkpoints") -> str:
    """A note that the best checkpoint is not the latest, with both losses.

    "" if it is, or if a checkpoint cannot be read.
    """
    from sheepop_jax.checkpoint.checkpoints import BEST_METRIC, DamagedCheckpoint

    try:
        best, steps = checkpoints.best(), checkpoints.steps()
        if best is None or not steps or best == steps[-1]:
            return ""
        lowest = checkpoints.best_score()
        loss = checkpoints.manifest(steps[-1])["figures"].get(BEST_METRIC)
    except InputError:
        return ""
    except DamagedCheckpoint:
        shown = "damaged"
    else:
        shown = "not evaluated" if loss is None else f"validation loss {loss:.4f}"
    return (
        f"the best checkpoint is step {best} (validation loss {lowest:.4f}), the latest is step "
        f"{steps[-1]} ({shown}); sample.py, evaluate and bench use the best unless --step latest "
        "is given"
    )


@contextlib.contextmanager
def command(flags: argparse.Namespace) -> Iterator[None]:
    """Logs to stderr and turns user errors into one line and an exit code.

    With `flags.debug`, shows tracebacks and full logs. Errors refer to the names in `flags`.
    """
    debug = flags.debug
    streams = _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # independent of the locale
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    shown = "%(asctime)s %(name)s %(levelname)s %(message)s" if debug else "%(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MaskingFormatter(shown))
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:  # other loggers: warnings only
        logging.getLogger("sheepop_jax").setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.ERROR)
        # The Hugging Face client logs each retry; it reads this variable on import.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        # When an Orbax write fails, asyncio reports the concurrent ones as "never retrieved".
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        yield
        sys.stdout.flush()  # raise BrokenPipeError here, not at exit
    except BrokenPipeError:
        # The reader closed the pipe. Python flushes stdout at exit, so redirect it to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        line = explained(error, set(vars(flags)))
        if not line:
            sys.excepthook = _print_masked
            raise
        if debug:
            _print_masked(type(error), error, error.__traceback__)
        print(f"error: {masked(line)}", file=sys.stderr)
        bad_input = isinstance(error, InputError | ModuleNotFoundError)
        sys.exit(EXIT_BAD_INPUT if bad_input else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:  # restore the caller's logging
        root.handlers[:] = before
        root.setLevel(level)
        streams.close()


def _print_masked(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints a traceback without the secrets of URLs."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def execute(run: Callable[..., int | None], flags: argparse.Namespace, *rest: Any) -> int:
    """Calls `run(flags, *rest)` as a `command`; returns its exit code, 0 for None."""
    with command(flags):
        code = run(flags, *rest)
    return code or 0


def _open_closed_streams() -> contextlib.ExitStack:
    """Opens closed standard streams (None); otherwise a new file would reuse their descriptor."""
    opened = contextlib.ExitStack()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, opened.enter_context(open(os.devnull, mode)))
            opened.callback(setattr, sys, name, None)
    return opened


def as_flags(text: str, flags: Collection[str]) -> str:
    """Replaces Python names in backticks with command-line flags.

    A name becomes a flag (`top_k` -> --top_k) or an override of a configuration field
    (`mesh.data=-1` -> --config.mesh.data=-1).
    """

    def flag(found: re.Match[str]) -> str:
        name = found[1]
        if name.partition("=")[0] in flags:
            return f"--{name}"
        field = name.partition("=")[0]
        return f"--config.{name}" if "." in field or field == "seed" else name

    return re.sub("`([^`]+)`", flag, text)


def explained(error: Exception, flags: Collection[str]) -> str:
    """Returns a one-line message for an error that a user can fix; "" for a bug."""
    match error:
        case InputError() if error.expected:
            field = f"--{error.field}" if error.field in flags else error.field
            expected, hint = as_flags(error.expected, flags), as_flags(error.hint, flags)
            return InputError.sentence(field, error.got, expected, hint)
        case InputError() | RunFailed():
            return str(error)
        case MemoryError():
            return f"out of memory ({error}); try smaller values"
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):  # from XLA
            reason = str(error).splitlines()[0][:200]
            return f"out of memory ({reason}); try fewer texts at once or a shorter context"
        case ModuleNotFoundError():
            return (
                f"the Python package {error.name} is not installed; try ./setup.sh and run this "
                "with .venv/bin/python"
            )
        case OSError():
            return str(error)
    return ""


_before_leaving: list[Callable[[], None]] = []


@contextlib.contextmanager
def before_leaving(action: Callable[[], None]) -> Iterator[None]:
    """In this context, Ctrl-C calls `action` before `leave_on_interrupt` ends the program."""
    _before_leaving.append(action)
    try:
        yield
    finally:
        _before_leaving.remove(action)


def leave_on_interrupt() -> None:
    """Makes Ctrl-C exit immediately with code 130, even while XLA compiles or decodes.

    For programs with nothing to save. A Python signal handler waits until compiled code returns; a
    thread that reads the wake-up file descriptor does not.
    """
    signal.signal(signal.SIGINT, lambda number, frame: None)  # only the thread ends the program
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)

    def wait() -> None:
        while os.read(read_end, 1) != bytes([signal.SIGINT]):
            pass
        for action in _before_leaving:
            action()
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def wait_for_terminal() -> None:
    """Waits after Ctrl-C: a terminal discards what is written while it sends the signal."""
    time.sleep(0.05)


def print_text(text: str, end: str = "\n") -> None:
    """Prints model or corpus text; escapes control characters on a terminal."""
    if sys.stdout.isatty():
        from sheepop_jax.formatting import printable

        text = printable(text)
    print(text, end=end, flush=not end)
