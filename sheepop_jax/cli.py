"""What the commands share: one-line errors, exit codes, logs on stderr."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from sheepop_jax.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps its line breaks and whose errors take one line."""

    def __init__(self, **options: object):
        # The options are argparse's own, each of its type: hence the ignore.
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Prints `error: …` and exits with 2."""
        print(f"error: {message}; try --help", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


@contextlib.contextmanager
def command(debug: bool) -> Iterator[None]:
    """Sets up logs on stderr, and turns what a user can mend into one line and an exit code.

    With `debug` tracebacks are shown and logs are full.
    """
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(message)s" if not debug else "%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    if not debug:  # others' loggers speak up only when something is wrong
        logging.getLogger("sheepop_jax").setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.ERROR)
        # The hub's client logs each retry; it reads this when it is imported.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        # When one of orbax's writes fails, those beside it are reported as "never retrieved".
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        yield
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        # Whoever read our output is gone. Python flushes stdout at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except ModuleNotFoundError as error:
        if debug:
            raise
        print(
            f"error: the Python package {error.name} is missing here; try ./setup.sh, and then "
            "run this with .venv/bin/python",
            file=sys.stderr,
        )
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
