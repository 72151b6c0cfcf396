"""Runs the application: socket, signals, orderly end."""

import logging
import os
import signal
import socket
import time
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.serving.app import make_app
from sheepop_jax.serving.metrics import Metrics
from sheepop_jax.serving.service import ServedModel, Service
from sheepop_jax.serving.settings import MAX_CONNECTIONS, MAX_HEADER_BYTES, Access, Limits
from sheepop_jax.serving.worker import Worker

log = logging.getLogger("sheepop_jax.serving")

EXIT_INTERRUPTED = 130
_LAST_WORDS_SECONDS = 1.0  # for errors to reach the clients of requests that took too long
_KEEP_ALIVE_SECONDS = 65  # more than the usual minute of proxies


def bind(access: Access) -> socket.socket:
    """Binds the port, without listening: a client that comes too early is refused.

    Raises:
        InputError: the address is not of this machine, or the port is taken.
    """
    shown = f"{access.host}:{access.port}"
    try:
        kinds = socket.getaddrinfo(access.host, access.port, type=socket.SOCK_STREAM)
        kinds.sort(key=lambda kind: kind[0] != socket.AF_INET)  # localhost: 127.0.0.1, not ::1
        family, _, _, _, address = kinds[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError("host", access.host, f"an address of this machine ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason, hint = error.strerror, "another `port`, or `port` 0 for a free one"
        raise InputError("port", shown, f"an address that is free ({reason})", hint) from None
    return listener


def serve(
    model: ServedModel, worker: Worker, access: Access, limits: Limits, listener: socket.socket
) -> int:
    """Answers requests until a signal, or until the engine fails.

    SIGTERM and SIGINT let running requests finish, for at most `limits.shutdown_seconds`; the
    second one ends the process at once.

    Args:
        model: what is served.
        worker: runs the model; started and stopped here.
        access: who may ask.
        limits: bounds on requests.
        listener: from `bind`; closed here.

    Returns:
        The exit code: 0, or 130 after SIGINT.

    Raises:
        RunFailed: the engine failed.
    """
    service = Service(model, worker, limits, Metrics())
    with listener:
        worker.start()
        try:
            server = _Server(make_app(service, access), service, listener)
            server.run(sockets=[listener])
        finally:
            worker.stop()
    if worker.failure is not None:
        reason = " ".join(str(worker.failure).split())[:300]
        raise RunFailed(f"the engine failed: {type(worker.failure).__name__}: {reason}")
    return EXIT_INTERRUPTED if server.signal == signal.SIGINT else 0


class _Server(uvicorn.Server):
    """uvicorn, which answers 503 while the last requests finish, instead of closing the port."""

    def __init__(self, app: Starlette, service: Service, listener: socket.socket):
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,  # it has query strings; `Guard` logs without them
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,  # `on_tick` has waited already
                limit_concurrency=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )
        self.signal = 0
        self._service, self._listener = service, listener
        self._deadline = self._last_words = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        log.info("serving http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Nothing here may wait for a lock: the signal may have come while a log line was written.
        if self.signal:
            os._exit(128 + sig)
        self.signal = sig

    async def on_tick(self, counter: int) -> bool:
        service, now = self._service, time.monotonic()
        if self._last_words:
            return service.in_flight == 0 or now > self._last_words
        if service.worker.failure is not None:  # the handlers have the error, and send it
            self._end(now)
        elif self.signal and not service.draining:
            seconds = service.limits.shutdown_seconds
            name = signal.Signals(self.signal).name
            text = "%s: finishing %d requests, at most %g s; send it again to exit at once"
            log.info(text, name, service.in_flight, seconds)
            service.draining, self._deadline = True, now + seconds
        elif service.draining and service.in_flight == 0:
            return True
        elif service.draining and now > self._deadline:
            service.abandon()
            self._end(now)
        return await super().on_tick(counter)

    def _end(self, now: float) -> None:
        """The last requests have errors; their clients get a moment to receive them."""
        self._service.draining, self._last_words = True, now + _LAST_WORDS_SECONDS
