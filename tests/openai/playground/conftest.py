"""The application behind a real socket, Chromium looking at it, and what tests do on the page and see of it."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from tests.openai.conftest import Triton

from dgemma_client import Client
from dgemma_client.mock import Handler, reply
from dgemma_client.requests import InferRequest
from dgemma_openai.app import create_app
from dgemma_openai.settings import Settings

# No sandbox, as CI is root; and nothing that asks Google's hosts at each start.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
ENDED = "article dl:not([hidden])"  # an answer that is all there
_STATUS = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")


@dataclass
class Site:
    """A running application."""

    url: str  # http://127.0.0.1:PORT
    triton: Triton


@dataclass
class Visit:
    """A page, and what must not happen on any: requests that leave the site, errors on the console."""

    page: Page
    site: str
    refusals: set[int] = field(default_factory=set)  # HTTP statuses that the test asks for
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("crash", lambda _: self.complaints.append("the page crashed"))

    def check(self) -> None:
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(f"{self.site}/")] == []

    def _hear(self, message: ConsoleMessage) -> None:
        status = _STATUS.match(message.text)
        if message.type in ("error", "warning") and not (status and int(status[1]) in self.refusals):
            self.complaints.append(message.text)


@contextmanager
def running_site(handler: Handler | None, settings: Settings) -> Iterator[Site]:
    triton = Triton(handler or reply("Hello ", "world"))
    app = create_app(settings, Client(transport=triton))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Site(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", triton)
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


@pytest.fixture
def start() -> Iterator[Callable[..., Site]]:
    """Starts an application: `start(handler, setting=value, ...)`."""
    with ExitStack() as stack:
        yield lambda handler=None, **settings: stack.enter_context(running_site(handler, Settings(**settings)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests of a module: Playwright's loop must not outlive it, or asyncio's tests could not run."""
    path = shutil.which("chromium")
    assert path is not None, "chromium is missing; install it: build/tooling/debian-packages chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens a site in a fresh profile: `visit(url, option=value, ...)`, with Playwright's options of a page."""
    visits: list[Visit] = []

    def go(url: str, refusals: tuple[int, ...] = (), **options: Any) -> Visit:
        page = browser.new_page(**options)
        visits.append(Visit(page, url, set(refusals)))
        visits[-1].listen()
        page.goto(f"{url}/", wait_until="networkidle")
        return visits[-1]

    yield go
    for each in visits:
        each.page.context.close()
        each.check()


class Script:
    """A handler that goes on to its next part when the test says so."""

    def __init__(self, *parts: list[Any]) -> None:
        self._parts, self._turn = parts, threading.Semaphore(0)

    def go_on(self) -> None:
        self._turn.release()

    def __call__(self, request: InferRequest) -> Iterator[Any]:
        for part in self._parts:
            while not self._turn.acquire(blocking=False):
                yield 0.01
            yield from part


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def asked(site: Site) -> dict[str, Any]:
    return {name: values[0] for name, values in site.triton.requests[-1].inputs.items()}


def canvas(page: Page) -> list[tuple[str, str]]:
    """(text, class) of each span of the canvas."""
    found = page.locator("article .canvas span").evaluate_all("all => all.map(s => [s.textContent, s.className])")
    return [(text, name) for text, name in found]


def figures(page: Page) -> dict[str, str]:
    page.wait_for_selector(ENDED)
    rows = (
        page.locator("article")
        .last.locator("dl > div")
        .evaluate_all("all => all.map(row => [...row.children].map(part => part.textContent))")
    )
    return dict(rows)
