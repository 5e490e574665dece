"""Server-sent events, however the network cuts them."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from playwright.sync_api import Page

READ = """async (chunks) => {
  const { events } = await import('/page/api.js');
  const body = new ReadableStream({ start(control) {
    for (const chunk of chunks) control.enqueue(new Uint8Array(chunk));
    control.close();
  } });
  const found = [];
  for await (const data of events(body)) found.push(data);
  return found;
}"""

lines = st.text(st.sampled_from("a: {}\N{LATIN SMALL LETTER I WITH DIAERESIS}\N{GRINNING FACE}"), max_size=6)
messages = st.lists(st.lists(lines, min_size=1, max_size=3), max_size=4)


def test_events_are_whole_whatever_the_cuts(page: Page) -> None:
    @example([["a", "b"]], "\r\n", True, [1] * 60, False)
    @given(messages, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.lists(st.integers(1, 5)), st.booleans())
    def check(messages: list[list[str]], end: str, space: bool, cuts: list[int], unfinished: bool) -> None:
        wire = f": a comment{end}{end}"
        for message in messages:
            wire += f"event: x{end}" + "".join(f"data:{' ' if space else ''}{line}{end}" for line in message) + end
        wire += f"data: cut{end}" if unfinished else ""
        data, chunks = list(wire.encode()), []
        for size in [*cuts, len(data)]:
            chunks.append(data[:size])
            data = data[size:]
        # Without the optional space, one that begins the line counts as it.
        expected = ["\n".join(line if space else line.removeprefix(" ") for line in message) for message in messages]
        # A stream that ends in a bare CR cannot tell whether its LF is still to come: the last event waits for it.
        found = page.evaluate(READ, chunks)
        assert found == expected or (end == "\r" and not unfinished and found == expected[:-1])

    check()
