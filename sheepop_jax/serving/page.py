"""The web page at `/`: one file, with the headers that let nothing else in."""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """The page and the headers that it is sent with."""

    content: bytes
    headers: dict[str, str]


def load_page() -> Page:
    """Reads `page.html` of this package."""
    return make_page((resources.files("sheepop_jax.serving") / "page.html").read_text("utf-8"))


def make_page(html: str) -> Page:
    """Adds the headers to a page.

    The policy allows the page's own inline script and style by their hashes, requests to this
    server, and nothing else: generated text that is HTML cannot run.
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = [
        "default-src 'none'",
        *(f"{kind}-src {' '.join(found) or repr('none')}" for kind, found in hashes.items()),
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Page(html.encode(), headers)
