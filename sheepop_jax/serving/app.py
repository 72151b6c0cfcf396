"""The routes: HTTP in, HTTP out."""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sheepop_jax.serving.api_error import ApiError
from sheepop_jax.serving.guard import Guard
from sheepop_jax.serving.metrics import CONTENT_TYPE
from sheepop_jax.serving.page import load_page
from sheepop_jax.serving.service import Prepared, Service, check_name
from sheepop_jax.serving.settings import Access

log = logging.getLogger(__name__)

T = TypeVar("T")


class JSON(Response):
    """A JSON answer; text that is not UTF-8 is escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumped(content)


def make_app(service: Service, access: Access) -> Starlette:
    """The ASGI application.

    Args:
        service: answers the requests.
        access: who may ask.
    """
    api = _Api(service)
    routes = [
        Route("/", api.page, methods=["GET"]),
        Route("/health", api.health, methods=["GET"]),
        Route("/metrics", api.metrics, methods=["GET"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{id:path}", api.model, methods=["GET"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/tokenizer_info", api.tokenizer_info, methods=["GET"]),
    ]
    paths = frozenset(route.path for route in routes)
    middleware = []
    if access.allow_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(access.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
        middleware.append(cors)
    middleware.append(Middleware(Guard, service=service, access=access, paths=paths, answer=JSON))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
    )
    app.router.redirect_slashes = False
    return app


class _Api:
    """One method for each route."""

    def __init__(self, service: Service):
        self._service = service
        self._page = load_page()

    async def page(self, request: Request) -> Response:
        return Response(self._page.content, headers=self._page.headers)

    async def health(self, request: Request) -> Response:
        service = self._service
        if service.draining:
            return JSON({"status": "shutting down"}, 503)
        if service.worker.failure is not None:
            return JSON({"status": "the engine failed"}, 503)
        return JSON({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        service, worker = self._service, self._service.worker
        gauges = [
            ("texts_active", "Texts being written.", worker.num_active),
            ("texts_waiting", "Texts waiting for a free row.", worker.num_waiting),
            ("texts_pending", "Texts admitted and not yet answered.", service.pending),
            ("slots", "Rows of the batch.", service.model.slots),
        ]
        page = service.metrics.render([(name, text, float(n)) for name, text, n in gauges])
        return Response(page, media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        return JSON({"object": "list", "data": self._service.models()})

    async def model(self, request: Request) -> Response:
        check_name(request.path_params["id"], self._service.model.name)
        return JSON(self._service.models()[0])

    async def tokenizer_info(self, request: Request) -> Response:
        return JSON(self._service.tokenizer_info())

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        return JSON(await asyncio.to_thread(self._service.tokenize, body))

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        return JSON(await asyncio.to_thread(self._service.detokenize, body))

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, self._service.prepare_completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, self._service.prepare_chat)

    async def _generate(self, request: Request, prepare: Callable[[bytes], Prepared]) -> Response:
        service, started = self._service, time.monotonic()
        # Encoding a long prompt takes a second: not in the event loop.
        prepared = await asyncio.to_thread(prepare, await self._body(request))
        service.admit(prepared)
        deadline = started + service.limits.request_seconds
        if prepared.options.stream:
            return _EventStream(service, prepared, started, deadline)
        try:
            answer = await _unless_client_leaves(
                request.receive, _before(deadline, service.whole(prepared))
            )
        except ClientDisconnect:
            service.metrics.left.add()
            return Response(status_code=499)  # nobody reads it
        finally:
            service.release(prepared)
            service.metrics.latency.observe(time.monotonic() - started)
        return JSON(answer)

    async def _body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            ApiError: 413 if it is too large, 408 if it takes too long.
        """
        most = self._service.limits.max_body_bytes
        too_large = ApiError(
            413, f"the body is larger than {most} bytes", headers={"Connection": "close"}
        )
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._service.limits.request_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            close = {"Connection": "close"}
            raise ApiError(408, "the body did not arrive in time", headers=close) from None
        return bytes(body)


class _EventStream(Response):
    """Server-sent events; releases the job however it ends."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, prepared: Prepared, started: float, deadline: float):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._service, self._prepared = service, prepared
        self._started, self._deadline = started, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_client_leaves(receive, self._write(send))
        except ClientDisconnect:
            self._service.metrics.left.add()
        finally:
            self._service.release(self._prepared)
            self._service.metrics.latency.observe(time.monotonic() - self._started)

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        pieces = self._service.stream(self._prepared)
        try:
            await _before(self._deadline, self._write_all(pieces, send))
            last = b"data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent
            last = _event(error.body)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    @staticmethod
    async def _write_all(pieces: AsyncIterator[list[dict[str, Any]]], send: Send) -> None:
        async for group in pieces:
            body = b"".join(map(_event, group))
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + dumped(content) + b"\n\n"


def dumped(content: Any) -> bytes:
    """JSON as UTF-8. A lone surrogate, which only a request can bring, is escaped."""
    write = functools.partial(json.dumps, content, allow_nan=False, separators=(",", ":"))
    try:
        return write(ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return write().encode()


async def _before(deadline: float, work: Awaitable[T]) -> T:
    """Awaits `work`.

    Raises:
        ApiError: 504 if it is not done at `deadline`, by the monotonic clock.
    """
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work
    except TimeoutError:
        raise ApiError(504, "the request took longer than this server allows") from None


async def _unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the client closes the connection.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    message = {404: "no such path", 405: "this path has another method"}.get(status, "error")
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    return JSON(ApiError(status, message, code=code).body, status, headers=headers)


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return JSON(error.body, error.status, headers=error.headers)
