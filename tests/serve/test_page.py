"""The chat page's files, without a browser (what it does in one is tested in tests/browser)."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cadre.serve import page

FOLDER = Path(page.__file__).parent
TEXTS = {name: page.read(name).decode("utf-8") for name in page.FILES}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
POLICY = dict(part.split(" ", 1) for part in page.HEADERS["Content-Security-Policy"].split("; "))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(TEXTS["index.html"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


TAGS = Tags().tags
IDS = [attributes["id"] for _, attributes in TAGS if "id" in attributes]


def test_all_files_of_the_folder_are_served_and_no_others() -> None:
    files = {path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert files == set(page.FILES)
    assert all(text.strip() for text in TEXTS.values())


@pytest.mark.parametrize("name", ["../app.py", "__init__.py", "/etc/passwd", "", "index.html/", "INDEX.HTML", "..\\app.py"])
def test_no_other_file_can_be_read(name: str) -> None:
    with pytest.raises(KeyError):
        page.read(name)


def test_every_address_in_the_files_is_one_of_them_and_relative() -> None:
    addresses = {value for _, attributes in TAGS for key in ("src", "href") if (value := attributes.get(key))}
    assert addresses >= {"page/main.js", "page/style.css", "page/icon.svg"}
    assert {address.removeprefix("page/") for address in addresses} <= set(page.FILES)
    imports = {found for text in SCRIPTS.values() for found in re.findall(r'from "\./([^"]+)"', text)}
    reached = imports | {address.removeprefix("page/") for address in addresses} | {"index.html"}
    assert reached == set(page.FILES)
    for name, text in TEXTS.items():
        foreign = re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", text.replace('xmlns="http://www.w3.org/2000/svg"', ""))
        assert foreign == [], name
        assert "@import" not in text and "url(" not in text, name


def test_the_policy_allows_own_files_only_and_no_string_to_become_markup() -> None:
    assert POLICY["default-src"] == "'none'"
    allowed = {name: value for name, value in POLICY.items() if value != "'none'"}
    assert allowed == {
        "script-src": "'self'", "style-src": "'self'", "img-src": "'self'", "connect-src": "'self'",
        "require-trusted-types-for": "'script'",
    }  # fmt: skip
    assert {"base-uri", "form-action", "frame-ancestors", "trusted-types"} <= POLICY.keys()
    assert page.HEADERS["X-Content-Type-Options"] == "nosniff"


def test_the_files_need_nothing_that_the_policy_forbids() -> None:
    for tag, attributes in TAGS:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes), tag
        assert tag != "style" and (tag != "script" or attributes.get("src")), tag
    for name, text in SCRIPTS.items():
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser"):
            assert way not in text, (name, way)


def test_the_scripts_find_every_element_they_name() -> None:
    assert len(IDS) == len(set(IDS))
    named = {found for text in SCRIPTS.values() for found in re.findall(r'byId\("([\w-]+)"\)', text)}
    assert len(named) > 20 and named <= set(IDS)
    pointed = {
        part for _, attributes in TAGS for key in ("for", "aria-controls", "aria-labelledby", "aria-describedby")
        for part in (attributes.get(key) or "").split()
    }  # fmt: skip
    assert pointed <= set(IDS)


def test_the_key_is_put_in_the_tabs_storage_and_nowhere_else() -> None:
    keeping = [name for name, text in SCRIPTS.items() if "apiKey.set" in text or "cadre.api-key" in text]
    assert sorted(keeping) == ["api.js", "settings.js"]
    assert "session.set(KEY" in SCRIPTS["api.js"] and "local" not in SCRIPTS["api.js"]
