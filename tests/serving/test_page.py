"""The server's page in headless Chromium, against a server that says exactly what a test tells it.

`stub` is the only fixture that knows that server: a test of the real one needs its own `url`.
"""

import base64
import contextlib
import hashlib
import json
import math
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.serving.processes import PATIENCE

PAGE = Path(__file__).resolve().parents[2] / "sheepop_jax/serving/page.html"
HOSTILE = '<img src=x onerror="window.hacked = true"><script>window.hacked = true</script>'


def security_policy(html: str) -> str:
    """Allows the page's own script, style and requests, and nothing else."""

    def hashed(tag: str) -> str:
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        return f"{tag}-src 'sha256-{digest}'"

    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; {hashed('script')}; {hashed('style')}; {rest}"


class Stream:
    """The answer to one request to generate, sent when and as a test says."""

    def __init__(self) -> None:
        self.data: queue.Queue[bytes | None] = queue.Queue()  # None: the connection is over
        self.left = threading.Event()  # the client closed the connection before the end
        self.ended = False

    def write_to(self, handler: BaseHTTPRequestHandler) -> None:
        watcher = threading.Thread(target=self.watch, args=[handler.connection])
        watcher.start()
        while (data := self.data.get()) is not None:
            handler.wfile.write(data)
        handler.connection.shutdown(socket.SHUT_RD)
        watcher.join()

    def watch(self, connection: socket.socket) -> None:
        """Waits until the client leaves, or until `write_to` wants no more."""
        with contextlib.suppress(ConnectionError):
            connection.recv(1)
        if not self.ended:
            self.left.set()
            self.data.put(None)


class Stub:
    """Serves the page; answers POST with the events that a test sends, when it sends them."""

    def __init__(self) -> None:
        self.model: dict[str, Any] = {"id": "tiny"}
        self.key: str | None = None  # what Authorization must hold
        self.refusals: list[tuple[int, dict[str, str], bytes]] = []  # for the next POSTs
        self.requests: queue.Queue[tuple[str, dict[str, Any], Stream]] = queue.Queue()
        self.stream = Stream()  # of the request last received
        self.connections: list[socket.socket] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                stub.connections.append(self.connection)

            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def refused(self) -> bool:
                wrong = stub.key and self.headers["Authorization"] != f"Bearer {stub.key}"
                if wrong:
                    self.answer(401, {}, b'{"error": {"message": "Invalid API key."}}')
                return bool(wrong)

            def do_GET(self) -> None:
                if self.path == "/":
                    html = PAGE.read_text(encoding="utf-8")
                    kind = "text/html; charset=utf-8"
                    policy = security_policy(html)
                    headers = {"Content-Type": kind, "Content-Security-Policy": policy}
                    self.answer(200, headers, html.encode())
                elif self.path == "/v1/models" and not self.refused():
                    self.answer(200, {}, json.dumps({"data": [stub.model]}).encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.refused():
                    return
                if stub.refusals:
                    self.answer(*stub.refusals.pop(0))
                    return
                stream = Stream()
                stub.requests.put((self.path, json.loads(body), stream))
                self.answer(200, {"Content-Type": "text/event-stream"}, b"")
                stream.write_to(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # so that closing the server joins them
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def received(self, path: str = "/v1/completions") -> dict[str, Any]:
        """The body of the next request to generate, once it is there."""
        got, body, self.stream = self.requests.get(timeout=PATIENCE)
        assert got == path
        return body

    def send(self, *chunks: dict[str, Any] | str) -> None:
        for chunk in chunks:
            data = chunk if isinstance(chunk, str) else json.dumps(chunk)
            self.stream.data.put(f"data: {data}\n\n".encode())

    def end(self, done: bool = True) -> None:
        """The end of the stream, as it should be or as of a server that died."""
        self.stream.ended = True
        if done:
            self.send("[DONE]")
        self.stream.data.put(None)

    def close(self) -> None:
        self.server.shutdown()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # most are closed
                connection.shutdown(socket.SHUT_RDWR)
        self.server.server_close()
        self.thread.join()


def chunk(text: str, *tokens: tuple[Any, ...], reason: str | None = None) -> dict[str, Any]:
    """Of `/v1/completions`. A token is (its text, its offset, probabilities of the most likely)."""
    logprobs = {
        "tokens": [token for token, _, _ in tokens],
        "text_offset": [offset for _, offset, _ in tokens],
        "token_logprobs": [math.log(top[token]) for token, _, top in tokens],
        "top_logprobs": [{other: math.log(p) for other, p in top.items()} for _, _, top in tokens],
    }
    return {"choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}]}


# " 7" is less likely than "7": in an object of JavaScript "7" comes first all the same.
BROWN = {" brown": 0.61, " red": 0.25, "7": 0.004, " quick": 0.1, "\n": 0.00002}
FOX = {" dog": 0.5, " cat": 0.3, " fox": 0.0123}
TOKENS = [
    ("The", 0, {"The": 0.97, "A": 0.02}),
    (" brown", 3, BROWN),
    (" fox", 9, FOX),
]
SENTENCE = [chunk(text, (text, offset, top)) for text, offset, top in TOKENS]


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def open_page(opened: Callable[..., Any], stub: Stub) -> Callable[..., Any]:
    """`open_page(**options)` of a context: the page of the stub."""
    return lambda **options: opened(stub.url, **options)


def text_of(page: Any) -> str:
    return page.locator("#output .turn").last.text_content()


def rows(page: Any) -> list[tuple[str, str]]:
    """What the panel says of the token pointed at; the chosen token is marked by a star."""
    found = []
    for row in page.locator("#alternatives tr").all():
        star = "*" if row.get_attribute("aria-current") == "true" else ""
        cells = row.locator("th, td").all_text_contents()
        found.append((star + cells[0], cells[1]))
    return found


def write(page: Any, stub: Stub, expect: Any, *chunks: dict[str, Any], prompt: str = "") -> None:
    """A text made of the chunks, to its end."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    stub.received()
    stub.send(*chunks)
    stub.end()
    expect(page.get_by_role("status")).to_have_text("Done.")


def test_the_page_is_one_file_without_inline_code() -> None:
    html = PAGE.read_text(encoding="utf-8")
    assert html.count("<script") == html.count("<script>") == 1
    assert html.count("<style") == html.count("<style>") == 1
    assert not re.search(r"<[^>]*\s(on\w+|style)\s*=", html), "refused by the security policy"
    assert not re.search(r"https?:|//\w+\.|@import|url\(", html), "loads something from elsewhere"
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|Fragment\("
    assert not re.search(unsafe, html)
    assert not re.search(r"localStorage|sessionStorage|cookie|indexedDB", html)


def test_text_appears_while_it_is_made(open_page: Any, stub: Stub, expect: Any) -> None:
    page = open_page()
    expect(page.get_by_role("heading", name="tiny")).to_be_visible()
    expect(page.get_by_role("radio", name="Chat")).to_be_hidden()
    settings = {"Temperature": "0.5", "Top-p": "0.9", "Max tokens": "3", "Seed": "7"}
    for label, value in {**settings, "Prompt": "Tell:\n "}.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Generate").click()
    assert stub.received() == {
        "model": "tiny", "prompt": "Tell:\n ", "temperature": 0.5, "top_p": 0.9, "max_tokens": 3,
        "seed": 7, "stream": True, "logprobs": 5,
    }  # fmt: skip
    stub.send(*SENTENCE[:2])
    expect(page.locator(".token").nth(1)).to_have_text(" brown")
    assert text_of(page) == "Tell:\n The brown"
    expect(page.get_by_role("status")).to_have_text("Generating…")
    assert page.locator("#output").get_attribute("aria-busy") == "true"
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    stub.send(SENTENCE[2], chunk("", reason="length"), usage)
    stub.end()
    expect(page.get_by_role("status")).to_have_text("The limit of tokens was reached.")
    assert text_of(page) == "Tell:\n The brown fox"
    assert page.locator("#output").get_attribute("aria-busy") == "false"
    figures = r"3 tokens, first after \d+\.\d\d s, \d+\.\d tokens/s, seed 7"
    assert re.fullmatch(figures, page.locator("#figures").text_content())
    classes = [node.get_attribute("class").split() for node in page.locator(".token").all()]
    assert classes == [["token", "p1"], ["token", "p2"], ["token", "p5"]]


def test_a_seed_is_drawn_and_told(open_page: Any, stub: Stub, expect: Any) -> None:
    page = open_page()
    page.get_by_role("button", name="Generate").click()
    seed = stub.received()["seed"]
    stub.send(*SENTENCE)
    stub.end()
    expect(page.locator("#figures")).to_contain_text(f"seed {seed}")
    page.get_by_role("button", name="Generate").click()
    assert stub.received()["seed"] != seed
    stub.end()


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_closes_the_connection(how: str, open_page: Any, stub: Stub, expect: Any) -> None:
    page = open_page()
    page.get_by_label("Prompt").fill("Once")
    page.get_by_label("Prompt").press("Control+Enter")
    stub.received()
    stub.send(*SENTENCE[:2])
    expect(page.locator(".token")).to_have_count(2)
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    assert stub.stream.left.wait(PATIENCE)
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    assert text_of(page) == "OnceThe brown"
    write(page, stub, expect, *SENTENCE, prompt="Twice")
    assert text_of(page) == "TwiceThe brown fox"


@pytest.mark.parametrize("how", ["mouse", "keyboard", "finger"])
def test_alternatives_are_shown(how: str, open_page: Any, stub: Stub, expect: Any) -> None:
    page = open_page(has_touch=how == "finger")
    write(page, stub, expect, *SENTENCE)
    tokens = page.locator(".token")
    if how == "keyboard":
        page.get_by_role("button", name="Stop").focus()
        page.keyboard.press("Tab")  # the text is one stop
        page.keyboard.press("ArrowRight")
        expect(tokens.nth(1)).to_be_focused()
    else:
        getattr(tokens.nth(1), "tap" if how == "finger" else "hover")()
    expect(page.locator("caption")).to_have_text("␣brown has probability 61.0%")
    assert rows(page) == [
        ("*␣brown", "61.0%"), ("␣red", "25.0%"), ("␣quick", "10.0%"), ("7", "0.4%"),
        ("↵", "0.002%"), ("all others", "3.6%"),
    ]  # fmt: skip
    assert tokens.nth(1).get_attribute("aria-describedby") == "alternatives"
    assert page.locator(".token[tabindex='0']").count() == 1
    if how == "keyboard":
        page.keyboard.press("End")
    else:
        getattr(tokens.nth(2), "tap" if how == "finger" else "hover")()
    expect(page.locator("caption")).to_have_text("␣fox has probability 1.2%")
    assert rows(page)[2:] == [("*␣fox", "1.2%"), ("all others", "18.8%")]


def test_a_chosen_token_that_is_not_among_the_likely_is_listed(
    open_page: Any, stub: Stub, expect: Any
) -> None:
    page = open_page()
    rare = chunk("Zebra", ("Zebra", 0, {"Zebra": 0.000004, "The": 0.5}))
    del rare["choices"][0]["logprobs"]["top_logprobs"][0]["Zebra"]
    write(page, stub, expect, rare)
    page.locator(".token").hover()
    expect(page.locator("caption")).to_have_text("Zebra has probability < 0.001%")
    assert rows(page) == [("The", "50.0%"), ("*Zebra", "< 0.001%"), ("all others", "50.0%")]


def test_tab_stops_and_visible_focus(open_page: Any, stub: Stub, expect: Any) -> None:
    page = open_page()
    write(page, stub, expect, *SENTENCE)
    stops = ["prompt", "temperature", "top-p", "max-tokens", "seed", "generate", "stop"]
    page.get_by_label("Prompt").focus()
    for stop in [*stops, "The"]:
        focused = page.locator(":focus")
        assert (focused.get_attribute("id") or focused.text_content()) == stop
        width = focused.evaluate("node => parseFloat(getComputedStyle(node).outlineWidth)")
        style = focused.evaluate("node => getComputedStyle(node).outlineStyle")
        assert width >= 2 and style == "solid", stop
        page.keyboard.press("Tab")


def test_tokens_that_are_parts_of_a_character(open_page: Any, stub: Stub, expect: Any) -> None:
    """Offsets count code points, and from the prompt's start; text is late, or for a next token."""
    page = open_page()
    euro = ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    first = chunk("🙂", ("🙂", 9, {"🙂": 0.9}), (euro[0], 10, {euro[0]: 0.5}))
    page.get_by_role("button", name="Generate").click()
    stub.received()
    stub.send(first)
    expect(page.locator(".token")).to_have_text(["🙂"])
    stub.send(chunk("", (euro[1], 10, {euro[1]: 0.8})))
    stub.send(chunk("€ and", (euro[2], 10, {euro[2]: 0.8}), (" and", 11, {" and": 0.1})))
    stub.send(chunk("", (" so", 15, {" so": 0.3}), (" on", 18, {" on": 0.3})))
    stub.send(chunk(" so on"), chunk("", ("<|endoftext|>", 21, {"<|endoftext|>": 0.25})))
    stub.end()
    texts = ["🙂", "€", " and", " so", " on", "<|endoftext|>"]
    expect(page.locator(".token")).to_have_text(texts, use_inner_text=False)
    assert text_of(page) == "".join(texts)
    shades = [node.get_attribute("class").split()[1] for node in page.locator(".token").all()]
    assert shades == ["p1", "p3", "p4", "p3", "p3", "p3"], "of the character, 0.5 * 0.8 * 0.8"
    page.locator(".token").nth(1).hover()
    expect(page.locator("#alternatives p")).to_have_text("3 tokens make up €")
    captions = page.locator("caption").all_text_contents()
    assert captions == [
        f"{token} has probability {p}"
        for token, p in zip(euro, ["50.0%", "80.0%", "80.0%"], strict=True)
    ]


def test_tokens_without_width(open_page: Any, stub: Stub, expect: Any) -> None:
    """Control characters, line breaks and zero-width spaces can be pointed at, and are named."""
    page = open_page()
    texts = ["a", "\n\n", "\x01", "\u200b", "\t", " "]
    tokens = [(text, "".join(texts).index(text), {text: 0.5}) for text in texts]
    write(page, stub, expect, chunk("".join(texts), *tokens))
    assert text_of(page) == "".join(texts)
    for node, name in zip(
        page.locator(".token").all(), ["a", "↵↵", "\\u{1}", "\\u{200b}", "⇥", "␣"], strict=True
    ):
        node.hover()
        expect(page.locator("caption")).to_have_text(f"{name} has probability 50.0%")


def test_text_without_probabilities(open_page: Any, stub: Stub, expect: Any) -> None:
    page = open_page()
    plain = [{"choices": [{"index": 0, "text": text, "logprobs": None}]} for text in ("a", "b")]
    write(page, stub, expect, *plain, prompt="Say ")
    assert text_of(page) == "Say ab"


def test_hostile_text_stays_text(open_page: Any, stub: Stub, expect: Any) -> None:
    stub.model = {"id": HOSTILE}
    page = open_page()
    token = (HOSTILE, 0, {HOSTILE: 0.2, HOSTILE + "2": 0.1})
    write(page, stub, expect, chunk(HOSTILE, token), prompt=HOSTILE)
    assert text_of(page) == HOSTILE * 2
    page.locator(".token").hover()
    shown = HOSTILE.replace(" ", "␣")
    expect(page.locator("caption")).to_have_text(f"{shown} has probability 20.0%")
    stub.refusals.append((400, {}, json.dumps({"error": {"message": HOSTILE}}).encode()))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text(HOSTILE)
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("img, body script + script, #output script, aside script").count() == 0
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, open_page: Any, stub: Stub, expect: Any) -> None:
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3): every shade of a token, labels, buttons, messages."""
    page = open_page(color_scheme=scheme)
    tokens = [("a", i, {"a": p}) for i, p in enumerate((0.9, 0.6, 0.3, 0.1, 0.01))]
    write(page, stub, expect, chunk("aaaaa", *tokens), prompt="Say")
    stub.refusals.append((400, {}, b"{}"))
    page.locator(".token").first.hover()
    names = ".token, .prompt, #legend li, label, button, #figures, caption, #alternatives td, h1"
    ratios = page.evaluate(
        """names => {
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = (rgb) => {
            const [r, g, b] = rgb.slice(0, 3).map((x) => x / 255)
              .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (node) => {
            const color = parse(getComputedStyle(node).backgroundColor);
            return color[3] === 0 ? behind(node.parentElement) : color;
          };
          return [...document.querySelectorAll(names)].filter((node) => node.offsetParent)
            .map((node) => {
              const pair = [light(parse(getComputedStyle(node).color)), light(behind(node))];
              const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
              return [node.className || node.tagName, ratio];
            });
        }""",
        names,
    )
    assert {name for name, _ in ratios} >= {f"token p{i}" for i in range(2, 6)} | {"prompt"}
    assert [(name, ratio) for name, ratio in ratios if ratio < 4.5] == []
    page_color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", page_color))) < 384) == (scheme == "dark")


def test_a_phone_needs_no_horizontal_scroll(open_page: Any, stub: Stub, expect: Any) -> None:
    stub.model = {"id": "a-model-with-a-name-of-more-than-forty-letters", "chat": False}
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)

    def fits() -> bool:
        widths = "[document.documentElement.scrollWidth, innerWidth]"
        return page.evaluate(widths) == [360, 360]

    expect(page.locator("h1")).to_contain_text("forty")
    assert fits()
    long = "x" * 300
    top = {"\n" + long: 0.1, "b": 0.05, "c": 0.04, "d": 0.03, "e": 0.02, "\n\n": 0.01}
    rest = "\n" * 40
    tokens = [(long, 0, {long: 0.5}), (" End", 300, top | {" End": 0.1}), (rest, 304, {rest: 0.5})]
    write(page, stub, expect, chunk(long + " End" + rest, *tokens), prompt=long)
    token = page.locator(".token").nth(1)
    token.evaluate("node => node.scrollIntoView({block: 'end'})")
    token.tap()
    expect(page.locator("caption")).to_be_in_viewport()
    assert fits()
    middle = "const box = node.getBoundingClientRect(), x = box.x + box.width / 2;"
    found = "return document.elementFromPoint(x, box.y + box.height / 2) === node;"
    assert token.evaluate(f"node => {{ {middle} {found} }}"), "behind the panel"
    for name in ("Generate", "Stop", "Close"):
        assert page.get_by_role("button", name=name).bounding_box()["height"] >= 24
    page.get_by_role("button", name="Close").tap()
    expect(page.get_by_role("button", name="Close")).to_be_hidden()


def test_an_api_key_is_asked_for(open_page: Any, stub: Stub, expect: Any) -> None:
    stub.key = "secret"
    page = open_page()
    expect(page.get_by_role("alert")).to_have_text("This server needs an API key.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server refused this API key.")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("tiny")
    expect(page.get_by_role("alert")).to_have_text("")
    write(page, stub, expect, *SENTENCE)
    assert text_of(page) == "The brown fox"
    stored = "[localStorage.length, sessionStorage.length, document.cookie]"
    assert page.evaluate(stored) == [0, 0, ""]
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("This server needs an API key.")


BUSY = {"Retry-After": "7"}
TOO_LONG = b'{"error": {"message": "prompt: got 9 tokens;\\nexpected at most 8"}}'


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((429, BUSY, b"{}"), "The server is busy; try again in 7 s."),
        ((429, {}, b"<html>"), "The server is busy; try again later."),
        ((400, {}, TOO_LONG), "prompt: got 9 tokens; expected at most 8"),
        ((502, {}, b"<h1>\nBad gateway</h1>"), "The server answered with status 502."),
        ((200, {}, b"<h1>Welcome</h1>"), "The server did not answer with a stream."),
    ],
    ids=["busy", "busy-no-time", "bad-request", "proxy", "another-page"],
)
def test_a_refusal_is_one_line(
    refusal: tuple, message: str, open_page: Any, stub: Stub, expect: Any
) -> None:
    page = open_page()
    stub.refusals.append(refusal)
    page.get_by_label("Prompt").fill("Once")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_have_text(message)
    assert page.get_by_role("alert").text_content() == message, "which spares no line break"
    assert page.get_by_role("status").text_content() == ""
    write(page, stub, expect, *SENTENCE, prompt="Once")
    assert page.get_by_role("alert").text_content() == ""
    assert text_of(page) == "OnceThe brown fox"


def test_a_connection_that_is_lost(open_page: Any, stub: Stub, expect: Any) -> None:
    page = open_page()
    alert = page.get_by_role("alert")
    page.get_by_role("button", name="Generate").click()
    stub.received()
    stub.send(*SENTENCE[:1])
    stub.end(done=False)
    expect(alert).to_have_text("The connection to the server was lost.")
    assert text_of(page) == "The"
    page.get_by_role("button", name="Generate").click()
    stub.received()
    stub.send(*SENTENCE[:2], {"error": {"message": "out of memory"}})
    stub.end()
    expect(alert).to_have_text("out of memory")
    assert text_of(page) == "The brown"
    stub.close()
    page.get_by_role("button", name="Generate").click()
    expect(alert).to_have_text("No connection to the server.")


def delta(content: str, reason: str | None = None) -> dict[str, Any]:
    """A chunk of `/v1/chat/completions`; a token for every two bytes."""
    data = content.encode()
    tokens = [
        {
            "token": part.decode(errors="replace"), "bytes": list(part), "logprob": math.log(0.5),
            "top_logprobs": [{"token": "no", "bytes": None, "logprob": math.log(0.25)}],
        }
        for part in (data[i : i + 2] for i in range(0, len(data), 2))
    ]  # fmt: skip
    choice = {"index": 0, "delta": {"content": content}, "logprobs": {"content": tokens}}
    return {"choices": [{**choice, "finish_reason": reason}]}


def test_a_conversation(open_page: Any, stub: Stub, expect: Any) -> None:
    stub.model = {"id": "talker", "chat": True}
    page = open_page()
    expect(page.get_by_role("radio", name="Chat")).to_be_checked()
    message, send = page.get_by_label("Message"), page.get_by_role("button", name="Send")
    send.click()
    expect(page.get_by_role("alert")).to_have_text("The message is empty.")
    message.fill("Hello?")
    message.press("Control+Enter")
    asked = stub.received("/v1/chat/completions")
    assert asked["messages"] == [{"role": "user", "content": "Hello?"}]
    assert (asked["logprobs"], asked["top_logprobs"], asked["stream"]) == (True, 5, True)
    stub.send(delta("It is €5"), delta("", reason="stop"))
    stub.end()
    expect(page.get_by_role("status")).to_have_text("The text ended.")
    expect(page.locator(".token")).to_have_text(["It", " i", "s ", "€5"], use_inner_text=False)
    page.locator(".token").nth(3).hover()
    expect(page.locator("#alternatives p")).to_have_text("2 tokens make up €5")

    stub.refusals.append((429, BUSY, b"{}"))
    message.fill("And?")
    send.click()
    expect(page.get_by_role("alert")).to_have_text("The server is busy; try again in 7 s.")
    expect(message).to_have_value("And?")  # not lost
    send.click()
    answered = {"role": "assistant", "content": "It is €5"}
    follow_up = {"role": "user", "content": "And?"}
    asked = stub.received("/v1/chat/completions")
    assert asked["messages"] == [{"role": "user", "content": "Hello?"}, answered, follow_up]
    stub.send(delta("no"))
    expect(page.locator(".turn")).to_have_text(
        ["YouHello?", "ModelIt is €5", "YouAnd?", "Modelno"], use_inner_text=False
    )
    page.get_by_role("button", name="New conversation").click()
    assert stub.stream.left.wait(PATIENCE)
    expect(page.locator(".turn")).to_have_count(0)
    message.fill("Again")
    send.click()
    asked = stub.received("/v1/chat/completions")
    assert asked["messages"] == [{"role": "user", "content": "Again"}]
    stub.end()
    page.get_by_text("Completion", exact=True).click()
    write(page, stub, expect, *SENTENCE, prompt="Now ")
    assert text_of(page) == "Now The brown fox"
