"""What goes wrong is said plainly, and can be tried again."""

from __future__ import annotations

from playwright.sync_api import BrowserContext, Page

from tests.browser.hands import notice, press, say, shown, start, wait_until
from tests.browser.server import PageServer, Refuse, Reply

KEY = "s3cret-key"


def test_a_server_with_a_key_is_asked_for_it_and_the_key_stays_in_the_tab(page: Page, server: PageServer) -> None:
    server.key = KEY
    page.reload()
    page.wait_for_selector("#settings[open]")
    assert "API key" in (page.text_content("#settings-note") or "")
    assert page.evaluate("document.activeElement.id") == "api_key"
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#go:not([disabled])")
    say(page, "So")
    assert shown(page).startswith("So of")
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]
    assert KEY not in page.evaluate("JSON.stringify(localStorage)") and KEY not in page.content()


def test_a_wrong_key_is_asked_for_again_and_the_request_then_made(page: Page, server: PageServer) -> None:
    server.key = KEY
    start(page, "So")
    page.wait_for_selector("#settings[open]")
    page.fill("#api_key", "wrong")
    page.keyboard.press("Enter")
    wait_until(lambda: server.refused == 2)
    page.wait_for_selector("#settings[open]")
    assert page.input_value("#api_key") == "wrong"
    page.fill("#api_key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#end:visible >> text=token")
    assert shown(page).startswith("So of") and len(server.requests) == 1


def test_a_request_for_a_key_can_be_put_off(page: Page, server: PageServer) -> None:
    server.key = KEY
    start(page, "So")
    page.wait_for_selector("#settings[open]")
    page.keyboard.press("Escape")
    assert "API key" in notice(page) and page.is_hidden("#settings")
    page.click("#notice button:has-text('Enter it')")
    page.fill("#api_key", KEY)
    page.click("#settings >> text=Done")
    page.wait_for_selector("#end:visible >> text=token")
    assert shown(page).startswith("So of") and page.is_hidden("#notice")


def test_a_full_server_is_waited_for(page: Page, server: PageServer) -> None:
    server.script = [Refuse(429, "full", Retry_After="1"), Refuse(429, "full", Retry_After="60"), Reply(" a")]
    start(page, "So")
    assert "busy" in notice(page)
    page.click("#notice button:has-text('Try now (60 s)')")
    page.wait_for_selector("#end:visible")
    assert shown(page) == "So a" and page.is_hidden("#notice") and len(server.requests) == 3


def test_waiting_for_a_full_server_can_be_stopped(page: Page, server: PageServer) -> None:
    server.script = [Refuse(429, "full", Retry_After="60")]
    start(page, "So")
    page.wait_for_selector("#notice button:has-text('Try now')")
    page.click("#go")
    page.wait_for_selector("#end:visible")
    assert page.is_hidden("#notice") and shown(page) == "So" and len(server.requests) == 1


def test_a_refusal_is_shown_in_the_servers_words_as_text(page: Page, server: PageServer) -> None:
    server.script = [Refuse(400, "the <b>prompt</b> is too long", "context_length_exceeded"), Reply(" a")]
    start(page, "So")
    assert notice(page) == "the <b>prompt</b> is too long"
    page.click("#notice button:has-text('Try again')")
    page.wait_for_selector("#end:visible")
    assert shown(page) == "So a" and page.is_hidden("#notice")


def test_a_lost_connection_keeps_what_came(page: Page, server: PageServer) -> None:
    server.script = [Reply(" a b", lose=True), Reply(" c")]
    start(page, "So")
    assert "connection was lost" in notice(page)
    assert shown(page) == "So a b" and "incomplete" in (page.text_content("#end-note") or "")
    say(page)
    assert server.requests[1][1]["prompt"] == "So a b" and shown(page) == "So a b c"
    assert page.is_hidden("#notice")


def test_an_error_in_the_middle_of_a_stream(page: Page, server: PageServer) -> None:
    server.script = [Reply(" a b", error="the request took longer than this server allows"), Reply(" c")]
    start(page, "So")
    assert notice(page) == "the request took longer than this server allows"
    press(page, "Try again")
    page.wait_for_selector("#end:visible >> text=1 token")
    assert shown(page) == "So c"


def test_a_server_that_is_gone(page: Page, server: PageServer) -> None:
    page.route("**/v1/completions", lambda route: route.abort("connectionrefused"))
    start(page, "So")
    assert "cannot be reached" in notice(page)
    assert shown(page) == "So"
    page.unroute("**/v1/completions")
    page.click("#notice button:has-text('Try again')")
    page.wait_for_selector("#end:visible >> text=token")
    assert shown(page).startswith("So of")


def test_a_server_that_is_not_there_yet(context: BrowserContext, server: PageServer) -> None:
    page = context.new_page()
    page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
    page.goto(server.url)
    assert "cannot be reached" in notice(page)
    assert page.text_content("#empty-title") == "Not connected." and page.is_disabled("#go")
    page.unroute("**/v1/models")
    page.click("#notice button:has-text('Try again')")
    page.wait_for_selector("#go:not([disabled])")
    assert page.text_content("#empty-title") == "Begin a text, and pocket goes on."


def test_a_proxys_page_instead_of_an_answer(page: Page, server: PageServer) -> None:
    page.route("**/v1/completions", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    start(page, "So")
    assert notice(page) == "The server refused with status 502."


def test_a_browser_that_forbids_storage_still_works(context: BrowserContext, server: PageServer) -> None:
    page = context.new_page()
    for kind in ("localStorage", "sessionStorage"):
        page.add_init_script(f"Object.defineProperty(window, '{kind}', {{ get() {{ throw 1; }} }})")
    page.goto(server.url)
    page.wait_for_selector("#go:not([disabled])")
    say(page, "So")
    assert shown(page).startswith("So of")
