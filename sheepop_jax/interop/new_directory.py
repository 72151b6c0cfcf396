"""A directory of exported files that appears whole, by one rename, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.files import pending_name


def check_new(path: Path, field: str) -> None:
    """Checks that a directory does not exist, or is empty.

    Args:
        path: the directory.
        field: field name for error messages.

    Raises:
        InputError: something is in the way.
    """
    got = ""
    if path.is_dir():
        if any(path.iterdir()):
            got = "a directory with files"
        elif path.samefile("."):
            got = "the current directory"  # the rename would leave every shell in it nowhere
    elif os.path.lexists(path):
        got = "a broken link" if path.is_symlink() else "a file"
    if got:
        raise InputError(field, f"{path} ({got})", "a new or empty directory", "another name")


@contextlib.contextmanager
def new_directory(path: Path, field: str) -> Iterator[Path]:
    """A temporary sibling that is renamed to `path` at the end, or deleted on any error.

    Args:
        path: a directory that does not exist or is empty.
        field: field name for error messages.

    Raises:
        InputError: something is in the way.
        RunFailed: a file cannot be written, as on a full disk.
    """
    check_new(path, field)
    target = path.resolve()
    pending = pending_name(target)
    created = [parent for parent in target.parents if not parent.exists()]
    done = False
    try:
        pending.mkdir(parents=True)
        yield pending
        os.replace(pending, target)
        done = True
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if not done:
            shutil.rmtree(pending, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()
