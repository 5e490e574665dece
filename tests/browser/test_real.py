"""The page on the real server, with a model of a few thousand parameters."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.browser.hands import say, shown, start, switch
from tests.serve.live import CONTEXT, Live, http


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live() as server:
        yield server


@pytest.fixture
def page(context: BrowserContext, live: Live) -> Iterator[Page]:
    page = context.new_page()
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("console", lambda message: broken.append(message.text) if message.type == "error" else None)
    page.goto(live.url)
    page.wait_for_selector("#go:not([disabled])")
    yield page
    assert not broken
    live.until(live.idle)


def fix_seed(page: Page, tokens: int, temperature: float = 0) -> None:
    page.click("#settings-open")
    page.fill("#temperature", str(temperature))
    page.fill("#max_tokens", str(tokens))
    page.fill("#seed", "1")
    page.keyboard.press("Enter")


def test_the_page_shows_what_the_api_says(page: Page, live: Live) -> None:
    fix_seed(page, 20)
    say(page, "The people")
    choice = live.complete("The people", max_tokens=20, top_p=0.95)["choices"][0]
    assert shown(page) == "The people" + choice["text"]
    spans = "".join(page.locator(".tok").all_text_contents())
    assert spans == choice["text"]


def test_experts_and_cache_come_from_the_model(page: Page, live: Live) -> None:
    fix_seed(page, 12)
    say(page, "The people")
    card = live.get("/v1/models").json()["data"][0]["cadre"]
    label = page.get_attribute("#token-grid", "aria-label") or ""
    layers = dict(part.removeprefix("layer ").split(": ") for part in label.split(" · "))
    assert [int(layer) for layer in layers] == card["sparse_layers"]
    for chosen in layers.values():
        experts = [int(expert) for expert in chosen.split(", ")]
        assert len(set(experts)) == card["top_k"] and max(experts) < card["experts"]
    body = {"prompt": "The people", "temperature": 0, "max_tokens": 12}
    usage = live.post("/v1/completions", body).json()["usage"]
    cached = usage["prompt_tokens"] + usage["completion_tokens"] - 1
    page.wait_for_selector(f"#cache-tokens:text-is('{cached} of {CONTEXT} tokens')")


def test_a_chat_over_several_turns(page: Page, live: Live) -> None:
    fix_seed(page, 10)
    switch(page, "Chat")
    say(page, "Who are you?")
    say(page, "Yes?")
    texts = page.locator(".turn .prose").all_text_contents()
    messages = [{"role": "user", "content": "Who are you?"}]
    for asked in ("Yes?", None):
        answer = live.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 10}).json()
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"].lstrip()})
        messages += [{"role": "user", "content": asked}] if asked else []
    assert texts == [message["content"] for message in messages]


def test_stop_frees_the_engine(page: Page, live: Live) -> None:
    fix_seed(page, 250, temperature=1)
    start(page, "The")
    page.wait_for_selector(".tok >> nth=1")
    page.click("#go")
    page.wait_for_selector("#end:visible")
    live.until(live.idle)


# Without a space the cut falls where a token ends, which may be within one of the two halves that a browser makes of an emoji.
@pytest.mark.parametrize("text", ["The naïve café served 你好 to 3 guests. " * 40, *("🌊" * 300 + "x" * n for n in range(4))])
def test_a_text_longer_than_the_context_goes_on(page: Page, live: Live, text: str) -> None:
    fix_seed(page, 200)
    say(page, text)
    assert page.locator("#log .mine .past").count() == 1 and page.locator(".tok").count() > 0


def test_a_key_and_a_full_server(context: BrowserContext) -> None:
    with Live(api_key="secret", max_batch=1, max_queue=0, engine={"max_batch": 1}) as server:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("#settings[open]")
        page.fill("#api_key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#go:not([disabled])")
        step, go_on = server.engine.step, threading.Event()
        server.engine.step = lambda: step() if go_on.wait(20) else []
        body = b'{"prompt": "The", "max_tokens": 20}'
        with server.connect(http("/v1/completions", body, "Authorization: Bearer secret")):
            server.until(lambda: bool(server.loop.live))
            start(page, "The")
            page.wait_for_selector("#notice-text:has-text('busy')")
            go_on.set()
            page.wait_for_selector("#end:visible >> text=token", timeout=20_000)
        assert len(shown(page)) > 3
