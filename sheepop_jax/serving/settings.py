"""What a server allows: sizes, times, and who may ask."""

import ipaddress
from dataclasses import dataclass

from sheepop_jax.errors import InputError

MAX_DEPTH = 32  # nesting of a JSON body
MAX_STOPS = 16
LONGEST_STOP = 1000  # characters
MAX_HEADER_BYTES = 16 * 2**10  # request line and headers together
MAX_CONNECTIONS = 1024


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; a request beyond one is refused before anything is computed.

    Attributes:
        max_body_bytes: size of a request's body.
        max_texts: texts that one request may ask for: prompts times `n`.
        max_new_tokens: new tokens of one text.
        max_queue: texts that may wait for a free row of the batch; more are refused (429).
        request_seconds: time for one request, from its first byte to the last of the answer.
        shutdown_seconds: time that running requests have left after SIGTERM.

    Raises:
        InputError: a value is out of range.
    """

    max_body_bytes: int = 4 * 2**20
    max_texts: int = 128
    max_new_tokens: int = 4096
    max_queue: int = 128
    request_seconds: float = 600.0
    shutdown_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_texts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "at least 1")
        if self.max_queue < 0:
            raise InputError("max_queue", self.max_queue, "at least 0")
        for name in ("request_seconds", "shutdown_seconds"):
            if not 0 < getattr(self, name) < 1e9:
                raise InputError(name, getattr(self, name), "a positive number of seconds")


@dataclass(frozen=True)
class Access:
    """Where the server listens, and who may ask.

    Attributes:
        host: address to bind.
        port: port to bind; 0 picks a free one.
        api_key: key that clients send as `Authorization: Bearer KEY`; "" asks for none.
        allow_origins: web origins whose pages may use the server, such as https://example.org; `*`
            for all.
        allow_hosts: names in the Host header besides localhost and IP addresses.
        insecure: whether to bind an address that other machines reach without a key.

    Raises:
        InputError: a value is invalid, or other machines could ask without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    insecure: bool = False

    def __post_init__(self) -> None:
        if not self.host:
            raise InputError("host", self.host, "an address, such as 127.0.0.1 or 0.0.0.0")
        if not 0 <= self.port < 2**16:
            raise InputError("port", self.port, "a port from 0 to 65535")
        if not (self.api_key.isascii() and self.api_key.isprintable()) or " " in self.api_key:
            raise InputError("api_key", "…", "printable ASCII without spaces")
        for origin in self.allow_origins:
            scheme, _, rest = origin.partition("://")
            if origin != "*" and (scheme not in ("http", "https") or not rest or "/" in rest):
                raise InputError("allow_origin", origin, "an origin such as https://example.org")
        for name in self.allow_hosts:
            if not name or not name.isascii() or set(name) & set(" :/"):
                raise InputError("allow_host", name, "a host name without port")
        if not (self.api_key or self.insecure or is_loopback(self.host)):
            raise InputError(
                "host",
                self.host,
                "a loopback address, since no API key is set",
                "`api_key` KEY, or `insecure` on a network that you trust",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
