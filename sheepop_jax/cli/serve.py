"""`sheepop-jax serve`: an OpenAI-compatible HTTP server for a run."""

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from sheepop_jax.cli.common import Parser, checked_step, load_params
from sheepop_jax.errors import InputError

log = logging.getLogger(__name__)

KEY_VARIABLE = "SHEEPOP_JAX_API_KEY"
DESCRIPTION = """\
Serve a run over HTTP, for clients of the OpenAI API, and with a page for a browser.

  GET  /                       a page to try the model
  GET  /v1/models              the model
  POST /v1/completions         continue text
  POST /v1/chat/completions    answer in a conversation
  POST /tokenize, /detokenize  text to token ids and back
  GET  /tokenizer_info         special tokens and context
  GET  /health, /metrics       for supervisors and Prometheus

Needs the extra: pip install "sheepop_jax[serve]"."""
EPILOG = f"""\
examples:
  python -m sheepop_jax serve --ckpt runs/quickstart
  python -m sheepop_jax serve --ckpt runs/base --port 8080 --slots 32
  {KEY_VARIABLE}=secret python -m sheepop_jax serve --ckpt runs/base --host 0.0.0.0

then, in another terminal:
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{{"prompt": "def main", "max_tokens": 32, "temperature": 0.8, "seed": 0}}'
  curl -N http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{{"prompt": "def main", "max_tokens": 32, "stream": true}}'

The text of a request with a seed is that of sample.py with the same settings. Prompts are not
logged. SIGTERM lets running requests finish. More: docs/serving.md.

exit codes: 0 stopped by SIGTERM, 1 failed, 2 bad input, 130 stopped by Ctrl-C"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser("serve", DESCRIPTION, EPILOG)
    parser.add_run()
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1: this machine)")
    text = "port to bind; 0 picks a free one and prints it (default 8000)"
    add("--port", type=int, default=8000, metavar="N", help=text)
    text = f"key that clients must send; safer in the environment, as {KEY_VARIABLE}"
    add("--api_key", metavar="KEY", help=text)
    text = "bind an address that other machines reach without a key"
    add("--insecure", action="store_true", help=text)
    text = "origin whose web pages may ask, e.g. https://example.org; repeatable; * for all"
    add("--allow_origin", action="append", default=[], metavar="ORIGIN", help=text)
    text = "name by which clients reach this server, besides localhost and addresses; repeatable"
    add("--allow_host", action="append", default=[], metavar="NAME", help=text)
    text = "model id that clients see (default: the name of the run directory)"
    add("--model_name", metavar="NAME", help=text)
    text = "texts that are generated at the same time (default 8)"
    add("--slots", type=int, default=8, metavar="N", help=text)
    text = "texts that may wait for a free slot; more get status 429 (default 128)"
    add("--max_queue", type=int, default=128, metavar="N", help=text)
    text = "most new tokens of one text (default 4096)"
    add("--max_new_tokens", type=int, default=4096, metavar="N", help=text)
    text = "most seconds for one request (default 600)"
    add("--request_seconds", type=float, default=600.0, metavar="S", help=text)
    return parser.parse(argv)


def run(flags: argparse.Namespace) -> int:
    """Serves a run until a signal.

    Raises:
        InputError: a flag or the run is invalid, or the extra is not installed.
        RunFailed: the engine failed.
    """
    # Flags are checked before anything is loaded.
    from sheepop_jax.serving.settings import Access, Limits

    wanted = checked_step(flags.step)
    access = Access(
        host=flags.host,
        port=flags.port,
        api_key=_api_key(flags.api_key),
        allow_origins=tuple(flags.allow_origin),
        allow_hosts=tuple(flags.allow_host),
        insecure=flags.insecure,
    )
    limits = Limits(
        max_new_tokens=flags.max_new_tokens,
        max_queue=flags.max_queue,
        request_seconds=flags.request_seconds,
    )
    if flags.slots < 1:
        raise InputError("slots", flags.slots, "at least 1")
    try:
        from sheepop_jax.serving.server import bind, serve
    except ModuleNotFoundError as error:
        rule = f"the Python package {error.name} to be installed"
        raise InputError("serve", flags.ckpt, rule, 'pip install "sheepop_jax[serve]"') from None

    from sheepop_jax.runtime import platform

    machine = platform.prepare(flags.platform)

    from sheepop_jax.checkpoint.run import open_run
    from sheepop_jax.generation.engine import Engine, EngineConfig
    from sheepop_jax.generation.requests import resolve_context
    from sheepop_jax.scoring import score
    from sheepop_jax.serving.chat import chat_format
    from sheepop_jax.serving.service import ServedModel
    from sheepop_jax.serving.worker import Worker

    opened = open_run(flags.ckpt)
    opened.checkpoints.resolve(flags.step or "latest")
    context = resolve_context(opened.config.model, flags.context)
    name = opened.directory.resolve().name if flags.model_name is None else flags.model_name
    if not (name and name.isprintable()):
        raise InputError("model_name", name, "printable text")
    served = ServedModel(
        name=name,
        tokenizer=opened.tokenizer,
        vocab_size=opened.vocab_size,
        context=context,
        learned_positions=opened.config.model.position == "learned",
        slots=flags.slots,
        chat=chat_format(opened.tokenizer),
    )
    listener = bind(access)
    with listener:
        params, _ = load_params(opened, wanted, flags.quantize)
        model = opened.model(machine.compute_dtype(flags.dtype))
        settings = EngineConfig(context=context, slots=flags.slots)

        def make_engine() -> Engine:
            engine = Engine(model, params, opened.tokenizer.end_ids, settings)
            log.info("compiling")
            engine.warm_up()  # no client waits for it later
            return engine

        def scores(texts: Sequence[Sequence[int]], top: int) -> Sequence[Any]:
            rows = 1 if len(texts) == 1 else 8  # few programs
            return score(model, params, texts, top=top, context=context, batch_size=rows)

        worker = Worker(make_engine, scores, opened.tokenizer)
        return serve(served, worker, access, limits, listener)


def _api_key(flag: str | None) -> str:
    if flag is None:
        return os.environ.get(KEY_VARIABLE, "")
    if not flag:
        raise InputError("api_key", flag, "a key that is not empty")
    return flag
