"""Under the hood: experts and cache, made visible."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page

from tests.browser.hands import press, say, start
from tests.browser.server import TEXT, PageServer, Reply, routes, token, words


def label(page: Page) -> str:
    return page.get_attribute("#token-grid", "aria-label") or ""


def in_words(number: int) -> str:
    return " · ".join(f"layer {row}: {chosen[0]}, {chosen[1]}" for row, chosen in enumerate(routes(number), 1))


def lit(page: Page) -> list[str]:
    return page.locator(".tok.lit").all_text_contents()


def cell(page: Page, canvas: str, row: int, expert: int) -> dict[str, float]:
    """The middle of a cell of the map: 26 pixels of labels, then cells of 18 by 18."""
    assert page.evaluate(f"Math.floor((document.querySelector('{canvas}').clientWidth - 26) / 16)") == 18
    return {"x": 26 + 18 * expert + 8, "y": 18 * row + 8}


def colour(page: Page, canvas: str, row: int, expert: int) -> tuple[int, ...]:
    place = cell(page, canvas, row, expert)
    script = "([id, x, y]) => Array.from(document.querySelector(id).getContext('2d').getImageData(x, y, 1, 1).data)"
    return tuple(page.evaluate(script, [canvas, place["x"], place["y"]]))


def test_pointing_at_a_token_shows_its_experts(page: Page) -> None:
    say(page, "So")
    last = len(words(TEXT)) - 1
    assert label(page) == in_words(last)
    page.hover(".tok >> nth=4")
    assert label(page) == in_words(4) == page.text_content("#token-experts")
    assert page.text_content("#token-text") == "·of"
    assert page.text_content("#token-place") == f"token 5 of {last + 1}"
    page.mouse.move(5, 5)
    assert label(page) == in_words(last)


def test_a_chosen_token_stays_until_it_is_let_go(page: Page) -> None:
    say(page, "So")
    last = len(words(TEXT)) - 1
    page.click(".tok >> nth=4")
    page.hover(".tok >> nth=9")
    assert label(page) == in_words(9)
    page.mouse.move(5, 5)
    assert label(page) == in_words(4) and page.locator(".tok.chosen").all_text_contents() == [" of"]
    page.keyboard.press("Escape")
    assert label(page) == in_words(last) and page.locator(".chosen").count() == 0


def test_the_keyboard_walks_over_the_tokens_and_says_what_it_finds(page: Page) -> None:
    say(page, "So")
    page.focus(".answer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert label(page) == in_words(1)
    assert in_words(1) in (page.text_content("#status") or "")
    page.keyboard.press("ArrowLeft")
    assert label(page) == in_words(0)


def test_lit_cells_are_those_of_the_token(page: Page) -> None:
    say(page, "So")
    page.click(".tok >> nth=4")
    accent, empty = (42, 103, 179, 255), (240, 240, 236, 255)
    for row, chosen in enumerate(routes(4)):
        for expert in range(16):
            wanted = accent if expert in chosen else empty
            assert colour(page, "#token-grid", row, expert) == wanted, (row, expert)


def test_the_map_counts_and_its_experts_find_their_words(page: Page) -> None:
    say(page, "So")
    texts = words(TEXT)
    with_expert = [text for number, text in enumerate(texts) if 8 in routes(number)[2]]
    page.hover("#use-grid", position=cell(page, "#use-grid", 2, 8))
    assert lit(page) == with_expert
    share = round(100 * len(with_expert) / len(texts))
    caption = f"Layer 3, expert 8: {len(with_expert)} of {len(texts)} tokens, {share}%"
    assert page.text_content("#use-caption") == caption
    page.mouse.move(5, 5)
    assert lit(page) == []
    page.click("#use-grid", position=cell(page, "#use-grid", 2, 8))
    page.mouse.move(5, 5)
    assert lit(page) == with_expert and page.text_content("#use-caption") == caption
    page.click(".tok.lit >> nth=1")  # held, it stays while its words are looked at
    assert lit(page) == with_expert
    page.click("#use-grid", position=cell(page, "#use-grid", 2, 8))
    assert lit(page) == with_expert[:0]
    page.click("#use-grid", position=cell(page, "#use-grid", 2, 8))

    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert (page.text_content("#use-caption") or "").startswith("Layer 2, expert 9:")
    assert lit(page) == [text for number, text in enumerate(texts) if 9 in routes(number)[1]]
    page.keyboard.press("Escape")
    assert lit(page) == [] and (page.text_content("#use-caption") or "").startswith("Used evenly, each expert would see 12.5%")


def test_the_map_is_darker_where_an_expert_is_used_more(page: Page, server: PageServer) -> None:
    chosen = [[[0, 1]] * 3, [[0, 1]] * 3, [[0, 2]] * 3, [[0, 3]] * 3]
    tokens = [{"id": number, "text": " x", "experts": experts} for number, experts in enumerate(chosen)]
    server.script = [Reply(pieces=[(" x", [each]) for each in tokens])]
    say(page, "So")
    blue = [colour(page, "#use-grid", 1, expert)[0] for expert in range(5)]
    assert blue[0] < blue[1] < blue[2] == blue[3] < blue[4]
    assert page.text_content("#use-most") == "100% of tokens"


def test_the_cache_beside_multi_head_attention(page: Page, server: PageServer) -> None:
    server.script = [Reply(" a b c d e f g h i j")]
    say(page, "one two three")
    # 3 tokens of the prompt and 10 new ones, of which the last has not been read.
    assert page.text_content("#cache-now") == "12.0 KiB"
    assert page.text_content("#cache-instead") == (
        "Multi-head attention of the same width would keep 48.0 KiB, 4 times as much."
    )
    assert page.text_content("#cache-tokens") == "12 of 256 tokens"
    meter, part = (page.locator(id).bounding_box() for id in ("#cache-meter", "#cache-part"))
    assert meter and part and abs(part["width"] / meter["width"] - 0.25) < 0.01
    press(page, "Clear")
    page.wait_for_selector("#cache-tokens:text-is('0 of 256 tokens')")


def test_it_follows_the_text_as_it_is_written(page: Page, server: PageServer) -> None:
    server.script = [Reply(" word" * 60, pause=0.03)]
    start(page, "So")
    seen = set()
    while page.text_content("#go") == "Stop":
        place = re.fullmatch(r"token (\d+) of (\d+)", page.text_content("#token-place") or "")
        if place:
            assert place[1] == place[2]
            seen.add(int(place[1]))
    assert len(seen) > 10 and max(seen) <= 60
    page.wait_for_selector("#cache-tokens:has-text('60 of 256')")


def test_an_older_answer_can_be_looked_at(page: Page, server: PageServer) -> None:
    server.script = [Reply(" a b"), Reply(" c d e")]
    say(page, "So")
    say(page)
    assert page.text_content("#token-place") == "token 3 of 3"
    page.click(".tok >> nth=1")
    assert page.text_content("#token-place") == "token 2 of 2"
    page.wait_for_selector("#cache-tokens:text-is('2 of 256 tokens')")


def test_closed_it_leaves_the_text_alone_and_stays_closed(page: Page) -> None:
    say(page, "So")
    page.click(".tok >> nth=1")
    page.click("#hood-toggle")
    assert page.is_hidden("#hood") and page.get_attribute("#hood-toggle", "aria-expanded") == "false"
    assert page.locator(".chosen, .answer[tabindex]").count() == 0
    page.click(".tok >> nth=2")
    assert page.locator(".chosen").count() == 0
    page.reload()
    page.wait_for_selector("#go:not([disabled])")
    assert page.is_hidden("#hood")


def test_a_dense_model_has_a_cache_only(page: Page, server: PageServer) -> None:
    server.model["cadre"] |= {"experts": 0, "top_k": 0, "sparse_layers": [], "cache_bytes_per_token_mha": 1024}
    page.reload()
    page.wait_for_selector("#go:not([disabled])")
    server.script = [Reply(pieces=[(" a", [{"id": 0, "text": " a", "experts": None}]), (" b", [])])]
    say(page, "So")
    assert page.is_hidden("#hood-experts") and page.is_visible("#cache-title")
    assert page.text_content("#cache-instead") == "As much as multi-head attention of the same width."
    assert "experts" not in (page.text_content("#empty-note") or "")


def test_a_large_model_fits_the_panel(page: Page, server: PageServer) -> None:
    server.model["cadre"] |= {"experts": 256, "top_k": 8, "sparse_layers": list(range(3, 61))}
    page.reload()
    page.wait_for_selector("#go:not([disabled])")
    experts = [[(row * 7 + expert * 31) % 256 for expert in range(8)] for row in range(58)]
    server.script = [Reply(pieces=[(" a", [{"id": 0, "text": " a", "experts": experts}])])]
    say(page, "So")
    box = page.locator("#use-grid").bounding_box()
    assert box and 100 < box["height"] <= 240
    assert label(page).startswith("layer 3: 0, 31, 62") and page.text_content("#token-experts") == ""


def _tokens(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


texts = st.text(st.sampled_from("ab \n\N{LATIN SMALL LETTER I WITH DIAERESIS}\N{GRINNING FACE}<&"), min_size=1, max_size=30)
cuts = st.lists(st.integers(0, 40), max_size=12)

FILL = """async ([pieces]) => {
  const { Answer } = await import('/page/answer.js');
  const answer = new Answer();
  for (const [text, tokens] of pieces) answer.add(text, tokens);
  return [answer.text, answer.node.textContent, answer.tokens.map(({ span }) => span && span.textContent)];
}"""


def test_whatever_the_chunks_the_text_is_whole_and_tokens_find_their_words(page: Page) -> None:
    """Text may come in other pieces than tokens do, later than they, or not at all for some of them."""

    @given(texts, cuts, cuts, st.integers(0, 3))
    def check(text: str, token_cuts: list[int], chunk_cuts: list[int], late: int) -> None:
        tokens = _tokens(text, token_cuts)
        exact: list[Any] = [(piece, [token(number, piece)]) for number, piece in enumerate(tokens)]
        got, drawn, spans = page.evaluate(FILL, [exact])
        assert got == drawn == text and spans == tokens

        # The same tokens, `late` chunks ahead of text that is cut elsewhere.
        pieces = [("", [token(number, piece)]) for number, piece in enumerate(tokens)][:late]
        rest = [token(number, piece) for number, piece in enumerate(tokens)][late:]
        chunks = _tokens(text, chunk_cuts)
        pieces += [(chunk, rest if number == 0 else []) for number, chunk in enumerate(chunks)]
        got, drawn, spans = page.evaluate(FILL, [pieces])
        assert got == drawn == text and len(spans) == len(tokens)

    check()
