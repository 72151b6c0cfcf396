"""Files at URLs, downloaded to a temporary directory or, for text, to the data cache."""

import base64
import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sheepop_jax.data.sources.rows import reason_of
from sheepop_jax.errors import InputError, masked
from sheepop_jax.files import pending_name, write_atomic

logger = logging.getLogger(__name__)

_NETWORK_SECONDS = 10  # socket timeout
_MAX_TEXT_BYTES = 2**30  # of a text; tables have no limit
_EXPECTED = "a file that can be downloaded"
_HINT = "checking the spelling and the network, or downloading it and passing its path"


@contextlib.contextmanager
def on_disk(field: str, place: str) -> Iterator[str]:
    """Yields a local path for `place`; a URL is downloaded to a temporary file.

    Streaming would need an optional package and a server that supports range requests.
    """
    if "://" not in place:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="sheepop-") as directory:
        try:
            path = os.path.join(directory, _name(place) or "table")
            with _open_url(place, {}) as answer:
                _copy(answer, Path(path), place, 0)
        except Exception as error:  # each URL scheme raises its own types
            raise _refusal(field, place, error) from None
        yield path


def cached_text(field: str, url: str, directory: Path) -> Path:
    """The local copy of a text at an http(s) URL; downloaded again only if the server has another.

    If the server does not answer, an older copy is used, with a warning.

    Args:
        field: the configuration field of the URL, for messages.
        url: the URL.
        directory: of all copies; created if needed.

    Raises:
        InputError: there is no copy, and the text cannot be downloaded or is too large.
    """
    try:
        name = _name(url).encode()[-80:].decode(errors="ignore")
    except ValueError as error:  # such as of https://[host]/
        raise _refusal(field, url, error) from None
    path = directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    about = path.with_name(f"{path.name}.http")  # what the server needs to compare
    try:
        headers = json.loads(about.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        headers = {}
    made = [parent for parent in (directory, directory.parent) if not parent.exists()]
    pending = pending_name(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{directory} ({error.strerror})"
        raise InputError("data.cache_dir", got, "a writable directory") from None
    try:
        with _open_url(url, headers) as answer:
            if answer.headers.get_content_type() == "text/html":
                if not _name(url).endswith((".html", ".htm")):
                    raise OSError("an HTML page, not a text file")
            _copy(answer, pending, url, _MAX_TEXT_BYTES)
            named = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
            sent = answer.headers
            headers = {name: sent[header] for name, header in named.items() if sent[header]}
        about.unlink(missing_ok=True)
        os.replace(pending, path)
        write_atomic(about, json.dumps(headers))
    except Exception as error:  # HTTP, socket and disk errors
        with contextlib.suppress(OSError):
            pending.unlink(missing_ok=True)
        if isinstance(error, urllib.error.HTTPError) and error.code == 304:
            error.close()  # the exception is also the open response
        elif path.is_file():
            said = "%s: not downloaded again (%s); using the copy from an earlier run"
            logger.warning(said, masked(url), masked(_network_reason(error)))
        else:
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise _refusal(field, url, error) from None
    return path


def _name(url: str) -> str:
    """The file name of a URL, whose suffix says how to read it."""
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name


def _copy(answer: IO[bytes], path: Path, url: str, limit: int) -> None:
    """Writes an answer to a file; more than `limit` bytes are an error, unless it is 0."""
    logger.info("data: downloading %s", masked(url))
    left = limit
    with path.open("wb") as file:
        if not limit:
            shutil.copyfileobj(answer, file, 2**20)
        while limit and (block := answer.read(2**20)):
            left -= len(block)
            if left < 0:
                raise OSError(f"larger than {limit} bytes")
            file.write(block)
    missing = getattr(answer, "length", None)  # bytes, if the server sent a length
    if missing:
        raise OSError(f"the connection closed {missing} bytes before the end")


def _open_url(url: str, headers: Mapping[str, str]) -> Any:
    if not url.lower().startswith(("http://", "https://")):
        import fsspec  # a dependency of `datasets`; handles hf:// and more

        return fsspec.open(url, "rb").open()
    parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=dict(headers))
    if at:
        # Not a plain header: that would be sent to wherever the server redirects, too.
        encoded = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return urllib.request.urlopen(request, timeout=_NETWORK_SECONDS)


def _refusal(field: str, url: str, error: Exception) -> InputError:
    return InputError(field, f"{url} ({_network_reason(error)})", _EXPECTED, _HINT)


def _network_reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # the exception is also the open response
        return f"HTTP {error.code}: {error.reason}"
    if "nonnumeric port" in str(error):  # the "port" may be a part of a password
        return "not a valid URL"
    reason = getattr(error, "reason", error)
    return reason_of(reason) if isinstance(reason, Exception) else str(reason)
