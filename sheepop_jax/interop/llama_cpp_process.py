"""The process in which llama.cpp runs: it ends the process where it finds a file wrong.

`LlamaCpp` starts it. The arguments are a file and a context; a request is a line of JSON on stdin,
its answer a line on stdout.
"""

import http.client
import json
import os
import sys
from typing import Any

_SILENT = -1


def main() -> None:
    """Loads the file of the command line and answers requests until stdin ends."""
    path, context = sys.argv[1:]
    # llama.cpp prints what it likes to stdout.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(content: dict[str, Any]) -> None:
            print(json.dumps(content), file=answers, flush=True)

        try:
            server = _load(path, int(context))
        except (RuntimeError, ValueError) as error:
            answer({"refused": _line(error)})
            return
        answer({})
        address = server.listening_address.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=60)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if "text" in request:
                    answer({"ids": _encode(connection, request["text"])})
                else:
                    answer({"logprobs": _next_token(server, **request)})
            except Exception as error:  # of any type: the library's, or an answer without a part
                answer({"failed": f"{type(error).__name__}: {_line(error)}"})
    os._exit(0)  # without llama.cpp's own end, which takes time and may abort


def _load(path: str, context: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    # By default it takes a thread per core, and those beyond our share wait for each other.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _cpus()
    params.warmup, params.fit_params = False, False
    params.verbosity = _SILENT
    # The defaults compute attention in float16, an error of 1e-2 that is not one of the file.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _cpus() -> int:
    """CPUs available to this process."""
    usable = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1


def _next_token(server: Any, prompt: list[int], top: int, complete: int) -> list[tuple[int, float]]:
    answer: dict[str, Any] = server.handle_completions(
        {
            "prompt": prompt,
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
    return [(one["id"], one["logprob"]) for one in entry["top_logprobs"]]


def _encode(connection: http.client.HTTPConnection, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": False})
    connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
    ids: list[int] = json.loads(connection.getresponse().read())["tokens"]
    return ids


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "no reason given"


if __name__ == "__main__":
    main()
