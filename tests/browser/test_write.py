"""Write mode: one text by two hands."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page

from tests.browser.hands import press, say, shown, start
from tests.browser.server import TEXT, PageServer, Reply, token


def test_a_text_is_continued_as_it_streams_and_again_from_where_it_is(page: Page, server: PageServer) -> None:
    server.script = [Reply(" one two"), Reply(" three"), Reply(" five")]
    say(page, "Fellow citizens  ")
    assert shown(page) == "Fellow citizens one two"
    assert page.text_content("#log .mine") == "Fellow citizens"
    say(page)
    say(page, "four")
    assert shown(page) == "Fellow citizens one two three four five"
    assert [body["prompt"] for _, body in server.requests] == [
        "Fellow citizens", "Fellow citizens one two", "Fellow citizens one two three four",
    ]  # fmt: skip
    path, body = server.requests[0]
    assert path == "/v1/completions"
    assert body == {
        "model": "pocket", "prompt": "Fellow citizens", "temperature": 0.8, "top_p": 0.95, "max_tokens": 128,
        "stream": True, "stream_options": {"include_usage": True}, "cadre": {"routes": True},
    }  # fmt: skip


def test_the_text_appears_while_it_is_written(page: Page, server: PageServer) -> None:
    server.script = [Reply(pause=0.05)]
    start(page, "Fellow citizens")
    page.wait_for_selector(".tok >> nth=3")
    assert page.text_content("#go") == "Stop"
    assert 0 < len(shown(page)) < len("Fellow citizens" + TEXT)
    page.wait_for_selector("#end:visible")
    assert shown(page) == "Fellow citizens" + TEXT
    assert page.text_content("#go") == "Continue"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_is_there_and_hangs_up(page: Page, server: PageServer, how: str) -> None:
    server.script = [Reply(" word" * 500, pause=0.02), Reply(" end")]
    start(page, "So")
    page.wait_for_selector(".tok >> nth=2")
    page.keyboard.press("Escape") if how == "escape" else page.click("#go")
    page.wait_for_selector("#end:visible")
    partial = shown(page)
    assert partial.startswith("So word") and "stopped" in (page.text_content("#end-note") or "")
    assert page.is_hidden("#notice")
    assert server.aborted.wait(30)
    say(page)
    assert server.requests[1][1]["prompt"] == partial


def test_try_again_replaces_the_last_answer_only(page: Page, server: PageServer) -> None:
    server.script = [Reply(" a"), Reply(" b"), Reply(" c")]
    say(page, "So")
    say(page)
    press(page, "Try again")
    page.wait_for_selector("#end:visible")
    assert shown(page) == "So a c"
    assert server.requests[2][1]["prompt"] == "So a"


def test_edit_copy_clear_and_undo(page: Page, server: PageServer) -> None:
    server.script = [Reply(" a"), Reply(" b")]
    say(page, "So")
    press(page, "Copy")
    page.wait_for_selector("#end button:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "So a"

    press(page, "Edit")
    page.fill("#log textarea", "dropped")
    page.keyboard.press("Escape")
    assert shown(page) == "So a"
    press(page, "Edit")
    assert page.input_value("#log textarea") == "So a"
    page.fill("#log textarea", "So be it,")
    page.click("#log button:has-text('Keep')")
    assert shown(page) == "So be it,"
    assert len(server.requests) == 1
    say(page)
    assert server.requests[1][1]["prompt"] == "So be it,"

    press(page, "Clear")
    assert page.is_visible("#empty")
    page.click("#notice button:has-text('Undo')")
    assert shown(page) == "So be it, b"


def test_keys_of_the_composer(page: Page, server: PageServer) -> None:
    page.focus("#prompt")
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("#end:visible")
    assert server.requests[0][1]["prompt"] == "One\ntwo"
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_an_empty_opening_is_the_models_to_make(page: Page, server: PageServer) -> None:
    server.script = [Reply("A text.", finish="stop")]
    say(page)
    assert server.requests[0][1]["prompt"] == ""
    assert shown(page) == "A text."
    assert "the model ended here" in (page.text_content("#end-note") or "")


def test_a_text_longer_than_the_context_is_read_from_its_end_and_the_rest_is_grey(page: Page, server: PageServer) -> None:
    sentence = "The year that closes has been one of labor and of plenty. "
    say(page, sentence * 30)
    prompt = server.requests[0][1]["prompt"]
    whole = (sentence * 30).rstrip()
    assert whole.endswith(prompt) and prompt.startswith("The year")
    tokens = len(server.ids(prompt))
    assert 110 < tokens <= 256 - 128
    assert server.requests[0][1]["max_tokens"] == 128
    grey = page.text_content("#log .mine .past") or ""
    assert grey + prompt == whole
    assert "grey: beyond the context of 256 tokens" in (page.text_content("#end-note") or "")


def test_markup_from_a_model_is_text(page: Page, server: PageServer) -> None:
    evil = " <img src=x onerror=document.title='gone'> <script>document.title='gone'</script> &lt; <b>bold</b>\n\n  * x"
    server.script = [Reply(evil)]
    say(page, "<i>So</i>")
    assert shown(page) == "<i>So</i>" + evil
    assert page.locator("#log img, #log script, #log i").count() == 0
    assert page.title() == "pocket · Cadre"
    assert page.evaluate("getComputedStyle(document.querySelector('#log .prose')).whiteSpace") == "pre-wrap"


def test_characters_of_several_tokens_and_text_held_back(page: Page, server: PageServer) -> None:
    pieces = [
        (" na", [token(0, " na")]),
        ("", [token(1, "")]),  # half of ï: its bytes are no character yet
        ("ïve", [token(2, "ï"), token(3, "ve")]),
        ("", [token(4, "bytes:\\xf0\\x9f")]),
        ("\N{SLIGHTLY SMILING FACE}!", [token(5, "bytes:\\x99\\x82"), token(6, "!")]),
        ("", [token(7, " held")]),
        (" held back", [token(8, " back")]),
        ("", [token(9, "<|eos|>")]),
    ]
    server.script = [Reply(pieces=pieces)]
    say(page, "A")
    assert shown(page) == "A naïve\N{SLIGHTLY SMILING FACE}! held back"
    spans = page.locator(".tok").all_text_contents()
    assert spans[:3] == [" na", "ï", "ve"] and spans[-2:] == [" held", " back"]
    assert re.match("10 tokens", page.text_content("#end-note") or "")
