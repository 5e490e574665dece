"""The pictures of the chat page in docs/images, taken from a running server:

cadre serve MODEL --model-name pocket
python -m tests.browser.screenshots http://127.0.0.1:8000/ docs/images
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.hands import say, start

OPENING = "Fellow citizens of the Senate and House of Representatives:"
DESKTOP = {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5}
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
}  # fmt: skip


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        page = opened(browser, url, color_scheme="light", **DESKTOP)
        say(page, OPENING)
        say(page, "As to the revenue,")
        page.mouse.move(600, 660)
        save(page, folder / "chat-light.png")

        page = opened(browser, url, color_scheme="dark", **DESKTOP)
        say(page, OPENING)
        page.click("#use-grid", position={"x": 26 + 18 * 11 + 8, "y": 18 + 8})
        page.hover(".tok.lit >> nth=2")
        save(page, folder / "chat-dark-experts.png")

        page = opened(browser, url, color_scheme="light", **PHONE)
        page.tap("#hood-toggle")
        start(page, OPENING)
        page.wait_for_selector("#end:visible")
        page.evaluate("document.querySelector('#scroll').scrollTop = 0")
        page.tap(".tok >> nth=14")
        save(page, folder / "chat-phone.png")
        browser.close()


def opened(browser: Browser, url: str, **screen: Any) -> Page:
    """A fresh visitor's page, with a seed so that the pictures can be made again."""
    context = browser.new_context(reduced_motion="reduce", **screen)
    context.add_init_script(
        """localStorage.setItem("cadre.settings", '{"temperature":0.7,"top_p":0.9,"max_tokens":110,"seed":3}')"""
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#go:not([disabled])")
    return page


def save(page: Page, path: Path) -> None:
    """With 256 colours, which is all that the page has, smoothed letters included."""
    page.wait_for_timeout(400)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
