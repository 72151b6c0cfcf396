"""HTTP servers as contenders: `python -m benchmarks.lib.servers SERVER DIRECTORY …`.

A turn is one streamed completion for each of `--clients` clients, all sent at once, from the first
byte sent to the last one received. Clients run in this process, the server in another.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.lib.contest import ROOT, serve
from benchmarks.lib.shapes import SHAPES

RUN, GGUF = "run", "gguf"  # names in a directory of `random_run`
TOKENS_PER_SLOT = 256  # of llama.cpp: as many as our cache has for these texts


def ours(flags: argparse.Namespace) -> list[str]:
    """The command of `sheepop_jax serve`."""
    words = ["-m", "sheepop_jax", "serve", "--ckpt", str(flags.directory / RUN), "--port", "0"]
    words += ["--slots", str(flags.slots), "--platform", flags.platform, "--dtype", flags.dtype]
    return [sys.executable, *words]


def llama(flags: argparse.Namespace) -> list[str]:
    """The command of llama.cpp's server."""
    return [sys.executable, "-m", "benchmarks.lib.servers", "serve_llama", *sys.argv[2:]]


def serve_llama(flags: argparse.Namespace) -> None:
    """Runs llama.cpp's server until standard input ends. Its settings are the defaults."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(flags.directory / GGUF / "model.gguf")
    params.n_ctx, params.n_parallel = TOKENS_PER_SLOT * flags.slots, flags.slots
    params.n_gpu_layers, params.port = 0, 0
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.fit_params, params.verbosity = False, -1
    server = xllamacpp.Server(params)
    print(f"serving {server.listening_address}", file=sys.stderr, flush=True)
    sys.stdin.read()
    os._exit(0)  # llama.cpp's own end takes time


def contender(flags: argparse.Namespace) -> None:
    """Serves turns with the clients of a server.

    Raises:
        SystemExit: the server ended before it was ready.
    """
    pipe = subprocess.PIPE
    command = {"ours": ours, "llama": llama}[flags.server](flags)
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stderr=pipe, text=True)
    try:
        lines: list[str] = []
        for line in process.stderr or ():
            if found := re.match(r"serving (http://\S+)", line):
                break
            lines.append(line)
        else:
            raise SystemExit("".join(lines[-5:]) or "the server ended")
        # Otherwise the pipe fills, and the server waits.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        vocab, shape = SHAPES[flags.shape].vocab, (flags.clients, flags.prompt)
        prompts = np.random.default_rng(0).integers(1, vocab, shape).tolist()

        def turn() -> dict[str, Any]:
            return asyncio.run(_turn(found[1], prompts, flags.new_tokens))

        serve(lambda: (turn, {}))
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stderr):
            with contextlib.suppress(BrokenPipeError, ValueError):
                stream.close()


async def _turn(url: str, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, Any]:
    """Returns the clients' seconds to the first text; all must get `new_tokens`."""
    found = await asyncio.gather(*(_complete(url, ids, new_tokens) for ids in prompts))
    counts = {count for _, count in found}
    if counts != {new_tokens}:
        raise SystemExit(f"texts of {sorted(counts)} tokens instead of {new_tokens}")
    return {"first": [first for first, _ in found]}


async def _complete(url: str, ids: list[int], new_tokens: int) -> tuple[float, int]:
    """Streams a completion; returns the seconds to its first text, and its tokens."""
    body = {
        "prompt": ids,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_prompt": False,  # llama.cpp: the prompts of all turns are the same
    }
    begin, first, count = time.perf_counter(), 0.0, 0
    async for event in _events(url, json.dumps(body).encode()):
        if not first and event["choices"] and event["choices"][0]["text"]:
            first = time.perf_counter() - begin
        if event.get("usage"):
            count = event["usage"]["completion_tokens"]
    return first, count


async def _events(url: str, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The events of a POST to /v1/completions, whose body is chunked.

    Raises:
        SystemExit: the server refuses it.
    """
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit((status + await reader.read()).decode(errors="replace"))
        while (await reader.readline()).strip():
            continue
        text = b""
        while size := int(await reader.readline(), 16):
            text += (await reader.readexactly(size + 2))[:size]
            *lines, text = text.split(b"\n\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))
    finally:
        writer.close()


def main() -> None:
    """Serves the turns selected by the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=["ours", "llama", "serve_llama"])
    parser.add_argument("directory", type=Path, help="from benchmarks.lib.random_run")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--platform", default="auto")
    parser.add_argument("--dtype", default="float32")
    flags = parser.parse_args()
    (serve_llama if flags.server == "serve_llama" else contender)(flags)


if __name__ == "__main__":
    main()
