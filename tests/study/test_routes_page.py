from __future__ import annotations

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest

from cadre.study.routes_page import marked, picture, render, shown, sparkline, strongest


def made_up(layers: int = 3, experts: int = 8, groups: int = 5, text: str = " word") -> dict:
    rng = np.random.default_rng(0)
    token = {"id": 7, "text": text, "count": 12, "share": 0.5, "lift": 3.25}
    context = {"before": "and so " + text, "token": text, "after": " it is" + text, "document": text + "1", "affinity": 0.5}
    return {
        "model": "pocket" + text, "data": "sotu", "documents": 9, "complete": False, "context": 64, "top_k": 2,
        "shared_experts": 1, "tokens": 123456, "excerpts": 321,
        "groups": [{"name": f"{1790 + 10 * g}s{text}", "tokens": 100} for g in range(groups)],
        "layers": [
            {
                "layer": layer + 1, "load": [1 / experts] * experts, "max_vio": 0.25, "load_entropy": 0.987, "dead_experts": 1,
                "next_layer": layer + 2 if layer + 1 < layers else None,
                "coactivation": rng.gamma(1, size=(experts, experts)).tolist() if layer + 1 < layers else None,
                "experts": [
                    {
                        "expert": e, "load": 0.0 if e == 3 else 1.5, "groups": rng.gamma(1, size=groups).tolist(),
                        "tokens": [] if e == 3 else [token] * 3, "contexts": [] if e == 3 else [context] * 2,
                    }
                    for e in range(experts)
                ],
            }
            for layer in range(layers)
        ],
    }  # fmt: skip


class Nesting(HTMLParser):
    """Fails where a tag is closed that is not the one open; keeps ids, links and text."""

    VOID = ("meta", "link", "br", "image", "rect", "path")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], set(), []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_sound_self_contained_and_says_all():
    page = render(made_up())
    found = Nesting(page)
    assert len(found.ids) == len(set(found.ids)) and {"layer-1", "layer-2", "layer-3"} <= set(found.ids)
    for link in found.links:
        assert link.startswith("data:") or link.removeprefix("#") in found.ids
    assert "script" not in found.tags and "@import" not in page and not re.search(r"https?://(?!www\.w3\.org)", page)
    text = "".join(found.text)
    for words in ("123,456", "321 excerpts of 9 documents", "3 \u00d7 8", "Layer 1 to layer 2", "1790s", "word3.2\u00d7",
                  "1.50 \u00d7 mean load", "98.7%", "Only the beginning", "4 times as often"):  # fmt: skip
        assert words in text, words
    assert page.count("data:image/png") == 1 + 3 + 2
    assert page.count("No token came here often enough") == 3


def test_without_groups_or_a_next_layer_their_sections_are_left_out():
    page = render(made_up(layers=1, groups=1))
    Nesting(page)
    assert 'id="documents"' not in page and 'id="between"' not in page and 'class="spark"' not in page


def test_hostile_text_is_escaped():
    page = render(made_up(text='<script>alert("x")</script>\'"&'))
    assert "script" not in Nesting(page).tags
    assert page.count("&lt;script&gt;") > 20


@pytest.mark.parametrize("text, html", [
    (" word", "word"), ("ing", '<i class="joined">\u2011</i>ing'), ("\n\n", "\u21b5\u21b5"), (" ", "\u2423"),
    ("  ", "\u2423\u2423"), (",", ","), (" a<b", "a&lt;b"), ("\t", "\u21e5"), ("", '<i class="joined">empty</i>'),
])  # fmt: skip
def test_tokens_show_what_cannot_be_seen(text, html):
    assert shown(text) == html


def test_only_the_token_is_marked_in_a_context():
    def mark(token):
        return marked({"before": "so ", "token": token, "after": " on"})

    assert mark(" the") == "so  <mark>the</mark> on"
    assert mark(".\n\n") == "so <mark>.\u21b5\u21b5</mark> on"
    assert mark(" ") == "so <mark>\u2423</mark> on"


def test_the_strongest_paths_come_first_and_none_below_chance():
    assert strongest([[1.0, 3.0], [5.0, 0.2]], 3) == [(1, 0, 5.0), (0, 1, 3.0)]


def test_a_picture_has_a_pixel_per_cell_in_the_colours_of_loads():
    from matplotlib.image import imread

    ratio = np.array([[0.0, 1.0, 2.0], [9.0, 1.0, 0.5]])
    svg = picture(ratio, ["0", "1"], ["a", "b", "a name that is much too long"], "label", rows="expert")
    pixels = imread(BytesIO(b64decode(re.search(r"base64,([^\"]+)", svg)[1])))
    assert pixels.shape == (2, 3, 4)
    assert pixels[0, 1, 3] == 0 and pixels[0, 0, 2] > pixels[0, 0, 0] and pixels[1, 0, 0] > pixels[1, 0, 2]
    assert "a name that is much t\u2026" in svg
    assert picture(ratio, ["0", "1"], ["a", "b", "c"], "label", rows="expert") == picture(
        ratio, ["0", "1"], ["a", "b", "c"], "label", rows="expert"
    )


@pytest.mark.parametrize("size", [1, 5, 64, 256])
def test_the_names_in_a_picture_do_not_overlap(size):
    names = [str(number) for number in range(size)]
    svg = picture(np.ones((size, size)), names, names, "x", rows="layer 1", columns="layer 2", square=True)
    columns = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">', svg)]
    rows = [float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">', svg)]
    assert columns and rows
    assert all(b - a > 5.4 * len(names[-1]) for a, b in pairwise(columns))
    assert all(b - a > 8 for a, b in pairwise(rows))


def test_a_sparkline_points_up_for_more_and_down_for_fewer():
    svg = sparkline([1.5, 0.75, 1.0], ["a", "b", "c"])
    assert re.findall(r'class="(up|down)" x="\d+" y="([\d.]+)" width="8" height="([\d.]+)"', svg) == [
        ("up", "1.0", "13.0"), ("down", "14.0", "6.5"), ("down", "14.0", "0.4"),
    ]  # fmt: skip
    assert "most often in a: 1.5 times as often as chance" in svg
