"""What the tests of the server share."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sheepop_jax.data.tokenizer import Tokenizer
from tests.conftest import _OUTSIDE
from tests.serving.fakes import make_tokenizer
from tests.serving.processes import PATIENCE

CHROMIUM_ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def process_env_of_module() -> dict[str, str]:
    """`process_env` for a server that a module's tests share."""
    return _OUTSIDE | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests that need it are skipped without it."""
    with start_browser() as browser:
        yield browser


@contextlib.contextmanager
def start_browser() -> Iterator[Any]:
    """Until its end, Playwright's event loop is the thread's: nothing else may run one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium, e.g. of `apt-get install chromium`")
    reason = "needs playwright, of requirements/dev.txt"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    playwright.expect.set_options(timeout=1000 * PATIENCE)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def expect() -> Any:
    """Playwright's assertions, which wait."""
    return pytest.importorskip("playwright.sync_api").expect


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """`opened(url, **options)` of a context: the page. In the end no error may have been logged.

    Chromium itself logs each answer of 400 and more, and each refused connection.
    """
    contexts, errors = [], []

    def log(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            errors.append(message.text)

    def open_page(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        page = context.new_page()
        page.on("console", log)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
