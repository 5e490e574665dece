from __future__ import annotations

import io

import pytest
from rich.console import Console

from cadre.cli.plan_tables import show
from cadre.plan import catalogue
from cadre.plan.hardware import hardware
from cadre.plan.planner import Request, make_plan


def shown(name: str, explain: bool = False, **choices: object) -> str:
    plain = dict(name=name, source="somewhere", shape=catalogue.lookup(name).shape, device=hardware("h800"), context=4096)
    out = io.StringIO()
    show(make_plan(Request(**{**plain, **choices})), explain, Console(file=out, width=80, highlight=False, markup=False))
    return out.getvalue()


@pytest.mark.parametrize("name", catalogue.names())
def test_every_model_is_readable_at_eighty_columns(name):
    text = shown(name, explain=True, devices=2048, tokens=1e12, notes=("a note",), ignored=("loops", "gates"))
    assert max(map(len, text.splitlines())) <= 80
    assert "ignored: loops, gates" in text and "note: a note" in text
    for heading in (
        "Parameters", "Compute and cache", "Training on 2,048 x h800", "Memory of the fullest device",
        "Where a step's time goes", "The fastest layouts that fit", "Decoding at context 4,096", "Assumptions", "Not included:",
    ):  # fmt: skip
        assert heading in text


def test_names_in_somebodys_config_are_no_commands_to_a_terminal():
    assert r"ignored: \x1b[31mred, [b]" in shown("deepseek-v2", ignored=("\x1b[31mred", "[b]"))


def test_the_numbers_stand_there():
    shape = catalogue.lookup("deepseek-v3").shape.without_extra()
    text = shown("deepseek-v3", devices=2048, tokens=14.8e12, mfu=0.39, shape=shape)
    for number in ("671,026,419,200", "37,552,297,472", "250.5 G", "70,272", "312,320 (4.4x)", "2,668,", "54.3 days"):
        assert number in text
    assert "Where a step's time goes" not in text


def test_what_does_not_fit_says_so():
    text = shown("deepseek-v3", devices=8)
    assert "training does not fit on 8 h800" in text
    assert "Memory of the leanest layout: does not fit" in text
    assert "one copy with one user at context 4,096 does not fit" in text
    assert "unknown: no layout to predict from" in text and "price" not in text
    text = shown("deepseek-v3", devices=8, tokens=1e12)
    assert "device-hours, price, energy  unknown; --mfu sets a share of the peak" in text
    assert "if it fitted" in shown("deepseek-v3", devices=8, mfu=0.2)
