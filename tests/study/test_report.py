"""The page of a study, however it went: one to three seeds, unfinished, with arms that diverged; renewed from its JSON."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.study import figures, turns
from cadre.study.conduct import begin
from cadre.study.report import NUMBERS, PAGE, PICTURES, main, render, write_report
from cadre.study.results import results
from cadre.study.spec import read_study
from cadre.study.state import write_json
from cadre.study.verdict import verdict
from tests.study.studies import Notes, write_study

NO_PICTURES = {**dict.fromkeys(PICTURES, "a picture"), "decode": None}
THIRD = """
[arms.four-layers]
held = []
[arms.four-layers.model]
num_hidden_layers = 4
first_k_dense_replace = 4
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A study of three arms with so many seeds, of which nothing is done yet."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CADRE_CACHE", str(folder / "cache"))
        patch.setattr(turns, "step_seconds", lambda recipes, *_, **__: dict.fromkeys(recipes, 0.01))
        states = {}
        for seeds in (1, 2, 3):
            study = write_study(folder, ("seeds = [0, 1]", f"seeds = {list(range(seeds))}"))
            study.write_text(study.read_text() + THIRD)
            states[seeds] = begin(*read_study(str(study)), folder / f"out{seeds}", quick=False, minutes=None, rent=None,
                                  cpu="a CPU", watch=Notes())  # fmt: skip
    return states


def leave(state, loss, sample=None, diverged=(), runs=None):
    """What runs leave: of each arm and seed a curve that falls to `loss`. `runs`: how many are done, None for all and the
    timings after them."""
    for place, job in enumerate(state.jobs):
        folder = state.path / job.folder
        (folder / "result.json").unlink(missing_ok=True)
        if runs is not None and place >= runs:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        end = loss(job.arm, job.seed)
        result = {"diverged": None, "bits_per_byte": end, "wall_seconds": 1.0, "cpu_seconds": 2.0, "peak_memory_bytes": 2**28}
        if job.kind == "run" and (job.arm, job.seed) in diverged:
            result = {"diverged": "loss is not finite", "steps": 7}
        (folder / "result.json").write_text(json.dumps(result))
        seen = end if sample is None else sample(job.arm)
        points = [
            {"step": job.steps * part // 5, "bits_per_byte": seen + (5 - part) / 5, "final": False} for part in range(1, 6)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    timed = runs is None
    rows = [
        {"arm": arm, "context": 8, "batch": batch, "tokens_per_second": 10.0, "rounds": 12}
        for arm in state.arms
        for batch in (1, 2)
    ] + [{"arm": arm, "context": 2**20, "batch": 1, "reason": "too long"} for arm in state.arms]
    for row in rows:
        if row["arm"] == "experts":
            row["over_first"] = {"low": 1.2, "median": 1.3, "high": 1.4}
        elif row["arm"] == "four-layers":
            row["same_as"] = "dense"
    for name, values in (("turns", {"step_seconds": dict.fromkeys(state.arms, 0.01)}), ("decode", rows)):
        if timed:
            write_json(state.path / f"{name}.json", values)
        else:
            (state.path / f"{name}.json").unlink(missing_ok=True)


def page(state):
    text = sound(write_report(state).read_text())
    assert json.loads((state.path / NUMBERS).read_text())["verdict"]["headline"] in text
    return text


def sound(text):
    """The page, whose words hold no value that a program has and a reader has not."""
    assert not re.search(r"\b(nan|None|inf|Undefined)\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    return text.replace("&#39;", "'")


@pytest.mark.parametrize(("seeds", "runs"), [(1, 0), (1, 7), (1, None), (2, 7), (2, None), (3, 8), (3, None)])
def test_a_study_at_any_point_has_its_page(begun, seeds, runs):
    state = begun[seeds]
    leave(state, lambda arm, seed: {"dense": 1.5, "experts": 1.4, "four-layers": 1.6}[arm] + seed / 1000, runs=runs)
    text = page(state)
    assert ("Not finished" in text) == (runs is not None)
    assert ("Decoding</h2>" in text) == (runs is None)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("gone", [["experts"], ["dense"], ["dense", "experts", "four-layers"]])
@pytest.mark.parametrize("every", [True, False])
def test_diverged_arms_and_seeds_have_their_page(begun, seeds, gone, every):
    state = begun[seeds]
    diverged = [(arm, seed) for arm in gone for seed in range(seeds if every else 1)]
    leave(state, lambda arm, seed: 1.5 + seed / 1000, diverged=diverged)
    text = page(state)
    assert f"{gone[0]}, seed 0: training diverged, so the run is left out." in text


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_whatever_the_losses_there_is_a_page(begun, data):
    state = begun[data.draw(st.integers(1, 3))]
    losses = {(arm, seed): data.draw(st.sampled_from([0.9, 1.499, 1.5, 1.501, 1.6])) for arm in state.arms for seed in range(3)}
    some = data.draw(st.lists(st.sampled_from(sorted(losses)), max_size=5))
    runs = data.draw(st.one_of(st.none(), st.integers(0, len(state.jobs))))
    leave(state, lambda arm, seed: losses[arm, seed], diverged=some, runs=runs)
    found = results(state)
    found["verdict"] = verdict(found)
    assert sound(render(found, NO_PICTURES))


def test_card_and_headline_name_the_arm_that_is_lowest_of_all_held_out_text(begun):
    state = begun[3]
    leave(state, lambda arm, seed: {"dense": 1.5, "experts": 1.4, "four-layers": 1.3}[arm] + seed / 1000,
          sample=lambda arm: {"dense": 1.7, "experts": 1.5, "four-layers": 1.8}[arm])  # fmt: skip
    text = page(state)
    assert re.search(
        r'Lowest held-out loss</dt><dd class="value">1.3010</dd><dd class="note">bits per byte, four-layers<', text
    )
    assert (
        "percentages and the lowest loss are of all held-out text; curves, and by how much an arm is sooner, are of a" in text
    )


def test_a_factor_of_some_seeds_says_of_how_many(begun):
    state = begun[3]
    ends = {"dense": [1.5, 1.5, 1.5], "experts": [1.2, 1.4, 1.51], "four-layers": [1.6, 1.6, 1.6]}
    leave(state, lambda arm, seed: ends[arm][seed])
    text = page(state)
    assert re.search(r"<td>\d\.\d\d \(\d\.\d\d to \d\.\d\d\), in 2 of 3 seeds</td>", text)
    assert re.search(r"FLOPs, in 2 of 3 seeds</dd>", text)
    assert "<td>not reached</td>" in text and "in 3 of 3" not in text


def test_arms_of_one_shape_are_said_to_be_and_the_middle_half_of_the_rounds_is_shown(begun):
    leave(begun[2], lambda arm, seed: 1.5)
    text = page(begun[2])
    assert (
        "in brackets how many times as fast as dense in the middle half of the rounds. dense and four-layers have one" in text
    )
    assert (
        "<td>10 (1.20\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}1.40)</td>" in text
        and "<td>10</td>" in text
        and "<td>does not fit</td>" in text
    )


def test_a_first_arm_whose_name_ends_with_s_has_its_apostrophe(begun):
    leave(begun[2], lambda arm, seed: {"dense": 1.5}.get(arm, 1.4))
    page(begun[2])
    found = json.loads((begun[2].path / NUMBERS).read_text())
    found["first"] = "experts"
    found["arms"]["dense"]["finals"] = {"0": 1.0, "1": 1.0}
    text = render(found, NO_PICTURES)
    assert "<dt>To experts' loss</dt>" not in text  # dense never gets there: its curve says 1.5
    found["sooner"]["dense"]["experts"] = found["sooner"]["experts"]["dense"]
    text = render(found, NO_PICTURES)
    assert "<dt>To experts' loss</dt>" in sound(text)


def test_a_page_is_renewed_from_its_numbers_alone(begun, tmp_path, capsys):
    leave(begun[2], lambda arm, seed: 1.5 - (arm == "experts") / 10)
    write_report(begun[2])
    found = json.loads((begun[2].path / NUMBERS).read_text())
    said = found.pop("verdict")
    for arm in found["arms"].values():  # as older versions wrote them
        del arm["passes"], arm["drafting"]
    found["decode"] = [
        {key: row[key] for key in row if key not in ("rounds", "over_first", "same_as")} for row in found["decode"]
    ]
    (tmp_path / NUMBERS).write_text(json.dumps(found))
    (tmp_path / "decode.png").write_bytes(b"old")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / PAGE}\n"
    renewed = json.loads((tmp_path / NUMBERS).read_text())
    assert renewed.pop("verdict")["headline"] == said["headline"] and renewed == found
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "loss-flops.png").exists()
    assert main([str(tmp_path / "none")]) == 2
    assert "results.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["a", "b"], ["a-rather-long-name-of-an-arm"] * 2 + ["b"] * 6])
def test_the_legend_is_above_the_axes_and_within_the_figure(names):
    names = [f"{name}{place}" for place, name in enumerate(names)]
    rows = [{"arm": name, "context": 8, "batch": 1, "tokens_per_second": 10.0} for name in names]
    figure = figures.decode_figure({"arms": dict.fromkeys(names), "decode": rows})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert box.y0 >= axes.y1 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
