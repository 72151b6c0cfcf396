"""One file of token ids, read by position."""

import os
import weakref
from pathlib import Path

import numpy as np

from sheepop_jax.errors import InputError


class TokenFile:
    """One token file, read with `pread`.

    A memory map would let resident memory grow with the file, and would kill the process (SIGBUS)
    if the file shrinks; here a shrunken file raises `InputError`.
    """

    def __init__(self, path: Path, dtype: str):
        self._path, self._dtype = path, np.dtype(dtype)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._tokens = os.fstat(self._file).st_size // self._dtype.itemsize

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, span: slice) -> np.ndarray:
        size = self._dtype.itemsize
        wanted = (span.stop - span.start) * size
        found = b""
        while len(found) < wanted:  # one pread returns at most 2 GiB
            start = span.start * size + len(found)
            block = os.pread(self._file, wanted - len(found), start)
            if not block:
                left = os.fstat(self._file).st_size
                raise damaged(self._path, f"{left} bytes", f"{self._tokens * size} bytes")
            found = found + block if found else block
        return np.frombuffer(found, self._dtype)


def damaged(path: Path, got: object, expected: str) -> InputError:
    directory = path if path.is_dir() else path.parent
    hint = f"deleting {directory}; the next run rebuilds it"
    return InputError(str(path), str(got), f"{expected} (from the manifest)", hint)
