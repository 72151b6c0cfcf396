"""What every request passes first: Host, Origin and key; and what is noted of it afterwards."""

import hmac
import ipaddress
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sheepop_jax.serving.api_error import ApiError
from sheepop_jax.serving.service import Service, shutting_down
from sheepop_jax.serving.settings import MAX_HEADER_BYTES, Access

log = logging.getLogger("sheepop_jax.serving")

_WITHOUT_KEY = ("/", "/health")  # nothing about the model or the requests
_WHILE_SHUTTING_DOWN = ("/health", "/metrics")


class Guard:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        access: Access,
        paths: frozenset[str],
        answer: Callable[..., ASGIApp],
    ):
        self._app, self._service, self._access = app, service, access
        self._paths, self._answer = paths, answer
        self._key = access.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the application starts and ends
            await self._app(scope, receive, send)
            return
        status, started = 0, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._service.in_flight += 1
        try:
            self._check(scope)
            await self._app(scope, receive, watched)
        except ApiError as error:
            answer = self._answer(error.body, error.status, headers=error.headers)
            await answer(scope, receive, watched)
        except ClientDisconnect:  # before its body was complete
            self._service.metrics.left.add()
        except Exception:
            log.exception("a request failed; this is a bug")
            if not status:
                bug = ApiError(500, "internal error", headers={"Connection": "close"})
                answer = self._answer(bug.body, bug.status, headers=bug.headers)
                await answer(scope, receive, watched)
        finally:
            self._service.in_flight -= 1
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Counts and logs a request: neither its query, nor its body, nor an unknown path."""
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._service.metrics.requests.add(route=path, status=str(status))
        if scope["method"] == "POST":
            log.info("POST %s %d, %.2f s", path, status, seconds)

    def _check(self, scope: Scope) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        # uvicorn bounds headers that arrive in pieces, not those that arrive at once.
        size = len(scope["query_string"]) + sum(len(a) + len(b) + 4 for a, b in scope["headers"])
        if size > MAX_HEADER_BYTES:
            most = f"more than {MAX_HEADER_BYTES} bytes of headers"
            raise ApiError(431, most, headers={"Connection": "close"})
        host = headers.get("host", "")
        if not self._is_allowed_host(host):
            # A page of another site can name this address; then the browser sends that site's name.
            raise ApiError(403, "the Host header names another server; see --allow_host")
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            own = urlsplit(origin).netloc == host
            if not (own or {origin, "*"} & set(self._access.allow_origins)):
                raise ApiError(403, "pages of another origin may not ask; see --allow_origin")
        if self._key and path not in _WITHOUT_KEY:
            self._check_key(headers.get("authorization", ""))
        if self._service.draining and path not in _WHILE_SHUTTING_DOWN:
            raise shutting_down()

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        equal = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        if not (equal and scheme.lower() == "bearer"):
            what = "a wrong API key" if header else "no API key"
            raise ApiError(
                401,
                f"{what}: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_allowed_host(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name = parts.hostname or ""
            _ = parts.port  # raises for one that is no number
        except ValueError:
            return False
        if parts.netloc != host or "@" in host:
            return False
        allowed = {"localhost", self._access.host.lower()}
        allowed |= {one.lower() for one in self._access.allow_hosts}
        return name in allowed or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
