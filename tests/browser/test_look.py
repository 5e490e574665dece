"""How the page behaves on any screen, for any hand, and towards the rest of the net."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from tests.browser.hands import press, say, shown, switch
from tests.browser.server import PageServer, Refuse, Reply


def ready(page: Page, url: str) -> Page:
    page.set_default_timeout(30_000)
    page.goto(url)
    page.wait_for_selector("#go:not([disabled])")
    return page


@pytest.fixture
def phone(browser: Browser, server: PageServer) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True, device_scale_factor=2, reduced_motion="reduce"
    )
    yield ready(context.new_page(), server.url)
    context.close()


def test_nothing_is_asked_of_anybody_else(context: BrowserContext, server: PageServer) -> None:
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    ready(page, server.url)
    say(page, "So")
    page.click("#settings-open")
    assert len(asked) > 10 and all(url.startswith(server.url) for url in asked)


def test_the_policy_stops_markup_and_foreign_code(page: Page) -> None:
    """The headers do their work: even a mistake in our script could not turn text into markup."""
    for attempt in ("document.body.innerHTML = '<b>x</b>'", "document.write('x')", "new Function('return 1')()"):
        # Later, because what the test's own tools run at once is exempt from the policy.
        later = "new Promise((done) => setTimeout(() => { try { %s; done('ran') } catch (error) { done(error.name) } }))"
        assert page.evaluate(later % attempt) in ("TypeError", "EvalError"), attempt


@pytest.mark.parametrize("mode", ["Write", "Chat"])
@pytest.mark.parametrize("hood", [False, True])
def test_a_phone_needs_no_sideways_scrolling(phone: Page, server: PageServer, mode: str, hood: bool) -> None:
    switch(phone, mode)
    if hood:
        phone.tap("#hood-toggle")
    server.script = [Reply(" " + "unbroken" * 30 + " and more words" * 20), Refuse(500, "x" * 300)]
    phone.fill("#prompt", "Fellow citizens")
    phone.tap("#go")
    phone.wait_for_selector("#end:visible")
    assert phone.evaluate("document.activeElement.id") != "prompt"  # the keyboard would cover the text
    phone.fill("#prompt", "more")
    phone.tap("#go")
    phone.wait_for_selector("#notice:visible")
    wide = """() => [...document.querySelectorAll('body *')].filter((node) => {
      const box = node.getBoundingClientRect();
      return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !node.closest('.unseen');
    }).map((node) => node.outerHTML.slice(0, 80))"""
    assert phone.evaluate(wide) == []
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    for name in ("#go", "#prompt"):
        box = phone.locator(name).bounding_box()
        assert box and box["y"] + box["height"] <= 640
    log = phone.locator("#scroll").bounding_box()
    assert log and log["height"] > 150
    panel = phone.locator("#hood").bounding_box()
    assert (panel is not None) == hood and (panel is None or 200 < panel["height"] <= 0.45 * 640)


def test_fingers_find_everything(phone: Page) -> None:
    say(phone, "Fellow citizens")
    for control in phone.locator("button:visible, .modes label").all():
        box = control.bounding_box()
        assert box and box["height"] >= 32 and box["width"] >= 32, control.inner_text()
    phone.tap("#hood-toggle")
    phone.tap(".tok >> nth=3")
    assert phone.text_content("#token-place") == "token 4 of 38"
    phone.tap("#settings-open")
    box = phone.locator("#settings").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] <= 640


def test_settings_are_kept_and_sent(page: Page, server: PageServer) -> None:
    page.click("#settings-open")
    page.fill("#temperature", "0.3")
    page.fill("#top_p", "0.5")
    page.fill("#max_tokens", "17")
    page.fill("#seed", "42")
    assert page.text_content("#temperature-now") == "0.30"
    page.keyboard.press("Enter")
    page.reload()
    page.wait_for_selector("#go:not([disabled])")
    say(page, "So")
    body = server.requests[0][1]
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.3, "top_p": 0.5, "max_tokens": 17, "seed": 42,
    }  # fmt: skip
    page.click("#settings-open")
    page.click("#settings-reset")
    page.keyboard.press("Escape")
    say(page, "So")
    assert "seed" not in server.requests[1][1] and server.requests[1][1]["temperature"] == 0.8


def test_a_setting_that_is_no_number_is_not_taken(page: Page, server: PageServer) -> None:
    page.evaluate('localStorage.setItem(\'cadre.settings\', \'{"temperature":"hot","top_p":null,"stop":[1],"seed":7}\')')
    page.reload()
    page.wait_for_selector("#go:not([disabled])")
    page.click("#settings-open")
    page.fill("#max_tokens", "-3")
    assert page.evaluate("document.querySelector('#max_tokens:invalid') !== null")
    page.keyboard.press("Escape")
    say(page, "So")
    body = server.requests[0][1]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.8, 0.95, 128, 7) and "stop" not in body


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_light_and_dark_follow_the_system_or_the_button(page: Page) -> None:
    light, dark = "rgb(251, 251, 249)", "rgb(18, 19, 22)"
    assert background(page) == light and page.get_attribute("#theme", "aria-pressed") == "false"
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("#theme[aria-pressed=true]")
    assert background(page) == dark
    page.click("#theme")
    assert background(page) == light
    page.reload(wait_until="commit")
    page.wait_for_selector("body")
    assert background(page) == light  # at once, without a flash of the other
    page.wait_for_selector("#go:not([disabled])")
    page.click("#theme")  # back to what the system says: then it follows the system again
    assert background(page) == dark
    page.emulate_media(color_scheme="light")
    assert background(page) == light


CONTRAST = """() => {
  const channel = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility({ opacityProperty: true }) || node.closest('.unseen, :disabled, .past')) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${node.outerHTML.slice(0, 60)} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    say(page, "Fellow citizens")
    page.click(".tok >> nth=3")
    press(page, "Clear")
    assert page.evaluate(CONTRAST) == []
    page.click("#notice button")
    switch(page, "Chat")
    say(page, "Hello")
    page.hover(".turn >> nth=0")
    page.click("#settings-open")
    assert page.evaluate(CONTRAST) == []


def test_every_control_has_a_name_and_a_place_in_the_order_of_keys(page: Page) -> None:
    say(page, "So")
    page.click("h1")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(({ id, className, value }) => id || className || value)(document.activeElement)"))
    order = ["write", "hood-toggle", "settings-open", "theme", "answer", "prompt", "go", "use-grid"]
    assert [name for name in reached if name in order][: len(order)] == order
    nameless = """() => [...document.querySelectorAll('button, input, textarea, canvas, dialog, aside')].filter((node) => {
      const labels = [...(node.labels ?? [])].map((label) => label.textContent).join('');
      return !(node.ariaLabel || node.getAttribute('aria-labelledby') || node.textContent.trim() || labels.trim());
    }).map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_screen_readers_hear_of_an_answer_once(page: Page, server: PageServer) -> None:
    switch(page, "Chat")
    server.script = [Reply("Yes, indeed.", pause=0.6)]
    page.fill("#prompt", "Well?")
    page.click("#go")
    page.wait_for_selector("#status:has-text('Writing')", state="attached")
    page.wait_for_selector("#status:has-text('Yes, indeed.')", state="attached")
    assert page.locator("#log [aria-live], #log [role=alert]").count() == 0


def test_the_view_follows_the_text_until_the_reader_scrolls_away(page: Page, server: PageServer) -> None:
    server.script = [Reply("\nline" * 120, pause=0.02)]
    page.fill("#prompt", "So")
    page.click("#go")
    page.mouse.move(400, 300)
    page.wait_for_selector(".tok >> nth=50")
    gap = """(() => {
      const box = document.querySelector('#scroll');
      return box.scrollHeight - box.scrollTop - box.clientHeight;
    })()"""
    assert page.evaluate(gap) < 60
    page.mouse.wheel(0, -400)
    page.wait_for_selector(".tok >> nth=80")
    assert page.evaluate(gap) > 350
    page.evaluate("(() => { const box = document.querySelector('#scroll'); box.scrollTop = box.scrollHeight; })()")
    page.wait_for_selector("#end:visible")
    assert page.evaluate(gap) < 60
    assert shown(page).count("line") == 120
