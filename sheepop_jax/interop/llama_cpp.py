"""A GGUF file opened in llama.cpp, by the package xllamacpp, without its log."""

import http.client
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sheepop_jax.errors import InputError

_SILENT = -1


def _cpus() -> int:
    """CPUs available to this process."""
    usable = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1


class LlamaCpp:
    """A model in llama.cpp, on the CPU, until `close`.

    llama.cpp listens on a port of this machine, which serves its tokenizer.
    """

    def __init__(self, path: Path, context: int):
        """Loads a file.

        Args:
            path: the file.
            context: number of tokens that a text and its continuation may have.

        Raises:
            InputError: xllamacpp is not installed, or llama.cpp does not load the file.
        """
        try:
            import xllamacpp
        except ModuleNotFoundError:
            expected, hint = "the package xllamacpp", "'pip install gguf xllamacpp'"
            raise InputError("format", "no package xllamacpp", expected, hint) from None
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        # By default it takes a thread per core, and those beyond our share wait for each other.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _cpus()
        params.warmup, params.fit_params = False, False
        params.verbosity = _SILENT
        # The defaults compute attention in float16, an error of 1e-2 that is not one of the file.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        no_flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = no_flash
        try:
            self._server = xllamacpp.Server(params)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else "no reason given"
            got = f"a file that llama.cpp does not load ({reason})"
            raise InputError(str(path), got, "a GGUF file") from None
        address = self._server.listening_address.removeprefix("http://")
        self._http = http.client.HTTPConnection(address, timeout=60)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the model's threads and frees its memory."""
        self._http.close()
        del self._server

    def next_token(self, text: Sequence[int], top: int, complete: int) -> dict[int, float]:
        """Log-probabilities of the token after a text, by id, largest first.

        Args:
            text: token ids, at least one; nothing is added to them. What it shares with the text
                of the last call is not computed again.
            top: number of tokens to return.
            complete: the id of any token that is whole characters.
        """
        answer: dict[str, Any] = self._server.handle_completions(
            {
                "prompt": list(text),
                "n_predict": 1,
                "temperature": 0.0,
                "n_probs": top,
                "cache_prompt": True,
                # Without this, there is no answer where the best token is part of a character, or
                # ends the text. The log-probabilities are those before the bias.
                "logit_bias": [[complete, 1e6]],
            }
        )
        [entry] = answer["choices"][0]["logprobs"]["content"]
        return {one["id"]: one["logprob"] for one in entry["top_logprobs"]}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as of a prompt: with BOS, if the file says so.

        Special tokens in the text are text.
        """
        body = json.dumps({"content": text, "add_special": True, "parse_special": False})
        self._http.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        ids: list[int] = json.loads(self._http.getresponse().read())["tokens"]
        return ids
