"""What a person does on the page."""

from __future__ import annotations

import time
from collections.abc import Callable

from playwright.sync_api import Page


def say(page: Page, text: str = "") -> None:
    """Type into the composer and press its button; returns once the answer is complete."""
    start(page, text)
    page.wait_for_selector("#end:visible")


def start(page: Page, text: str = "") -> None:
    page.fill("#prompt", text)
    page.click("#go")


def switch(page: Page, mode: str) -> None:
    page.click(f"label:has-text('{mode}')")


def shown(page: Page) -> str:
    """The text as it is on the page, letter by letter."""
    return page.text_content("#log .prose") or ""


def press(page: Page, label: str) -> None:
    page.click(f"#end button:has-text('{label}')")


def notice(page: Page) -> str:
    page.wait_for_selector("#notice:visible")
    return page.text_content("#notice-text") or ""


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something outside the page."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
