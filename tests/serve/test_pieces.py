import asyncio
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.serve.pieces import dumps, pieces, written

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(VALUES, st.lists(VALUES, max_size=3))
def test_the_pieces_are_the_text(value, rows):
    whole = {"value": value, "rows": rows * 50, "none": []}
    assert "".join(pieces(whole)) == dumps(whole)
    lazy = {"value": value, "rows": iter(rows * 50), "none": iter(())}
    assert json.loads("".join(pieces(lazy))) == whole
    assert json.loads(dumps({"rows": iter(rows * 50)})) == {"rows": rows * 50}


def test_a_long_list_is_drawn_as_it_is_written():
    drawn = []
    steps = pieces({"rows": (drawn.append(number) or number for number in range(10_000))})
    next(steps), next(steps)
    assert 0 < len(drawn) < 200


@pytest.mark.parametrize("write", [dumps, lambda value: "".join(pieces(value))])
def test_what_is_no_json_is_refused(write):
    with pytest.raises(ValueError):
        write({"value": math.inf})


def test_others_have_their_turn_meanwhile():
    async def run():
        turns = 0

        async def other():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        text = await written({"rows": iter(range(1_000_000))})
        task.cancel()
        return turns, text

    turns, text = asyncio.run(run())
    assert turns > 10 and len(json.loads(text)["rows"]) == 1_000_000
