"""The chat page in a real browser: Debian's Chromium, driven by playwright. Not part of `make test`: `make test-browser`."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.browser.server import PageServer

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = next((found for found in map(shutil.which, PROGRAMS) if found), None)
    if program is None:
        pytest.exit(f"no browser found ({', '.join(PROGRAMS)}): apt-get install chromium", returncode=2)
    with sync_playwright() as playwright:
        # The sandbox wants privileges that containers lack; the pages shown here are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light", reduced_motion="reduce")
    context.set_default_timeout(30_000)  # a loaded machine is no failure
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: PageServer) -> Iterator[Page]:
    """The page, connected. At the end: no script failed, and nothing was blocked by the content security policy."""
    page = context.new_page()
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("console", lambda message: broken.append(message.text) if "Security Policy" in message.text else None)
    page.goto(server.url)
    page.wait_for_selector("#go:not([disabled]), #notice:not([hidden]), #prompt[placeholder='Your message']")
    yield page
    assert not broken
