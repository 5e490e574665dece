"""Chat mode: messages in turn."""

from __future__ import annotations

from playwright.sync_api import Page

from tests.browser.hands import press, say, start, switch
from tests.browser.server import PageServer, Reply


def turns(page: Page) -> list[str]:
    return page.locator(".turn .prose").all_text_contents()


def sent(server: PageServer) -> list[str]:
    return [message["content"] for message in server.requests[-1][1]["messages"]]


def test_a_conversation(page: Page, server: PageServer) -> None:
    switch(page, "Chat")
    assert page.is_disabled("#go")
    server.script = [Reply(" Yes."), Reply("No.")]
    say(page, " Is it? ")
    say(page, "Sure?")
    assert turns(page) == ["Is it?", "Yes.", "Sure?", "No."]
    assert page.locator(".turn h2").all_text_contents() == ["You", "pocket", "You", "pocket"]
    path, body = server.requests[1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
    ]
    assert body["cadre"] == {"routes": True} and body["max_tokens"] == 128


def test_an_edited_message_is_asked_again_and_what_followed_is_gone(page: Page, server: PageServer) -> None:
    switch(page, "Chat")
    server.script = [Reply("a"), Reply("b"), Reply("c")]
    say(page, "one")
    say(page, "two")
    page.hover(".turn >> nth=0")
    page.click(".turn >> nth=0 >> text=Edit")
    page.fill("#log textarea", "three")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#end:visible")
    assert turns(page) == ["three", "c"]
    assert sent(server) == ["three"]


def test_each_message_can_be_copied_and_the_answer_tried_again(page: Page, server: PageServer) -> None:
    switch(page, "Chat")
    server.script = [Reply("a"), Reply("b")]
    say(page, "one")
    press(page, "Try again")
    page.wait_for_selector("#end:visible")
    assert turns(page) == ["one", "b"] and sent(server) == ["one"]
    page.hover(".turn >> nth=1")
    page.click(".turn >> nth=1 >> text=Copy")
    page.wait_for_selector(".turn >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "b"


def test_old_messages_leave_a_full_context_in_pairs(page: Page, server: PageServer) -> None:
    switch(page, "Chat")
    server.script = [Reply(f"answer{number}" + " word" * 40) for number in range(5)]
    for number in range(5):
        say(page, f"question{number}")
    # An exchange has 42 tokens, and half of the context is the answer's: 128 are left, of which 127 are used.
    assert [text.split()[0] for text in sent(server)] == [
        "question1", "answer1", "question2", "answer2", "question3", "answer3", "question4",
    ]  # fmt: skip
    grey = page.locator(".turn.past .prose").all_text_contents()
    assert [text.split()[0] for text in grey] == ["question0", "answer0"]


def test_write_and_chat_keep_their_own_texts_and_the_choice_is_remembered(page: Page, server: PageServer) -> None:
    server.script = [Reply(" a"), Reply("b")]
    say(page, "Text")
    switch(page, "Chat")
    assert page.is_visible("#empty") and "no chat template" in (page.text_content("#empty-note") or "")
    say(page, "Hello")
    switch(page, "Write")
    assert page.text_content("#log") == "Text a"
    switch(page, "Chat")
    page.reload()
    page.wait_for_selector("#prompt[placeholder='Your message']")
    assert page.is_checked("[value=chat]")


def test_switching_stops_the_answer(page: Page, server: PageServer) -> None:
    server.script = [Reply(" word" * 500, pause=0.02)]
    start(page, "Text")
    page.wait_for_selector(".tok >> nth=1")
    switch(page, "Chat")
    assert server.aborted.wait(30)
    page.wait_for_selector("#go:has-text('Send')")
    assert page.is_visible("#empty")


def test_a_model_known_to_chat_opens_in_chat(page: Page, server: PageServer) -> None:
    assert page.is_checked("[value=write]")
    server.model["cadre"] |= {"chat_template": True, "base_model": False}
    page.reload()
    page.wait_for_selector("#prompt[placeholder='Your message']")
    assert page.is_checked("[value=chat]") and "chat template" not in (page.text_content("#empty-note") or "")
