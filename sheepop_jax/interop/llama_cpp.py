"""A GGUF file opened in llama.cpp, by the package xllamacpp, without its log."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sheepop_jax.errors import InputError
from sheepop_jax.interop import llama_cpp_process

_SECONDS_TO_END = 10


class LlamaCpp:
    """A model in llama.cpp, on the CPU, until `close`.

    It runs in a process of its own, since llama.cpp aborts where it finds a file wrong. There it
    listens on a port of this machine, which serves its tokenizer.
    """

    def __init__(self, path: Path, context: int):
        """Loads a file.

        Args:
            path: the file.
            context: number of tokens that a text and its continuation may have.

        Raises:
            InputError: xllamacpp is not installed, or llama.cpp does not load the file.
        """
        if importlib.util.find_spec("xllamacpp") is None:
            expected, hint = "the package xllamacpp", "'pip install gguf xllamacpp'"
            raise InputError("format", "no package xllamacpp", expected, hint)
        self._path = path
        self._log = tempfile.TemporaryFile()
        # -P: the files beside the program are no modules of it.
        words = [sys.executable, "-P", llama_cpp_process.__file__, str(path), str(context)]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # else it starts a debugger
        )
        try:
            found = self._answer()
            if "refused" in found:
                got = f"a file that llama.cpp does not load ({found['refused']})"
                raise InputError(str(path), got, "a GGUF file")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.communicate(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        finally:
            self._log.close()

    def next_token(self, text: Sequence[int], top: int, complete: int) -> dict[int, float]:
        """Log-probabilities of the token after a text, by id, largest first.

        Args:
            text: token ids, at least one; nothing is added to them. What it shares with the text
                of the last call is not computed again.
            top: number of tokens to return.
            complete: the id of any token that is whole characters.

        Raises:
            InputError: llama.cpp fails.
        """
        found = self._ask({"prompt": list(text), "top": top, "complete": complete})
        return dict(map(tuple, found["logprobs"]))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as of a prompt: with BOS, if the file says so.

        Special tokens in the text are text.

        Raises:
            InputError: llama.cpp fails.
        """
        ids: list[int] = self._ask({"text": text})["ids"]
        return ids

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            print(json.dumps(request), file=self._process.stdin, flush=True)
        found = self._answer()
        if "failed" in found:
            got = f"a file with which llama.cpp fails ({found['failed']})"
            raise InputError(str(self._path), got, "a GGUF file")
        return found

    def _answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            InputError: the process has ended instead.
        """
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        names = {-one.value: one.name for one in signal.Signals}
        ended = names.get(code, f"exit code {code}")
        got = f"a file at which llama.cpp ends ({ended}{self._last_words()})"
        raise InputError(str(self._path), got, "a GGUF file")

    def _last_words(self) -> str:
        """What the process wrote last, after a colon; "" if nothing."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        said = [" ".join(line.split())[:200] for line in lines if line.strip()]
        return f": {said[-1]}" if said else ""
