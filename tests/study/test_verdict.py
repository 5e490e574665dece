"""The verdict says who won, and says it no louder than the runs allow."""

import random

import pytest

from cadre.study.results import Curve, _sooner
from cadre.study.verdict import best, interval, verdict

STEPS = tuple(range(50, 1001, 50))


def results(seconds=None, steps=STEPS, complete=True, decode=(), **losses):
    """Results of arms given by their final losses, one a seed: curves that fall evenly to them, at a FLOP a step."""
    arms, curves = {}, {}
    for name, finals in losses.items():
        step_seconds = (seconds or {}).get(name, 1.0)
        curves[name] = {
            seed: Curve(steps, tuple(final + 1 - step / steps[-1] for step in steps), 1.0, step_seconds)
            for seed, final in enumerate(finals)
        }
        arms[name] = {
            "curves": {
                str(seed): {"steps": list(c.steps), "bits_per_byte": list(c.bits_per_byte)} for seed, c in curves[name].items()
            },
            "finals": {str(seed): final for seed, final in enumerate(finals)},
            "steps": steps[-1], "sweep": [], "learning_rate_factor": 1.0, "diverged": [], "acceptance": [],
            "step_seconds": step_seconds, "step_seconds_before": step_seconds, "seconds": steps[-1] * step_seconds,
            "flops": float(steps[-1]), "wall_seconds": {"mean": steps[-1] * step_seconds}, "kv_cache_bytes_per_token": 700,
            "share_of_budget": 1.0, "passes": 1.5,
        }  # fmt: skip
    names = list(arms)
    return {
        "first": names[0], "arms": arms, "complete": complete, "runs_done": 1, "runs": 4, "decode": list(decode),
        "seeds": list(range(max(len(finals) for finals in losses.values()))),
        "sooner": {a: {b: _sooner(curves[a], curves[b]) for b in names if a != b} for a in names},
    }  # fmt: skip


def test_the_winner_is_named_with_its_factors():
    said = verdict(results(dense=[1.5, 1.52], experts=[1.3, 1.32]))
    assert said["outcomes"] == {"experts": "wins"}
    assert said["headline"].startswith("Experts wins. experts ends with 13.2% lower loss than dense (-13.3% to -13.2% over")
    assert "Experts reaches dense's final loss with 1.25 times fewer FLOPs and in 1.25 times less time." in said["headline"]


def test_text_learned_by_heart_decides_nothing():
    found = results(experts=[1.5], dense=[1.3])
    curve = found["arms"]["experts"]["curves"]["0"]
    curve["bits_per_byte"][9] = 1.25
    found["arms"]["experts"]["passes"] = 12.0
    said = verdict(found)
    assert said["headline"].startswith("No verdict: experts learned the text by heart, so that held-out loss rose again.")
    assert "up to 12.0 times: give more text" in said["headline"]
    assert "experts: its held-out loss ends 20.0% above the lowest it had." in said["cautions"]
    assert any("read the text 12.0 times" in caution for caution in said["cautions"])
    assert "reaches" not in said["arms"]["dense"] and "the text learned by heart" in said["arms"]["dense"]
    assert said["outcomes"] == {"dense": "unknown"}
    found["arms"]["experts"]["passes"] = 1.5  # a rate too high, say: it is said, and the race stands
    said = verdict(found)
    assert said["outcomes"] == {"dense": "leans"} and "20.0% above the lowest" in " ".join(said["cautions"])
    assert not any("times" in caution for caution in verdict(results(experts=[1.5], dense=[1.3]))["cautions"])


def test_a_win_by_the_clock_of_one_arm_is_a_win():
    found = results(seconds={"experts": 2.0}, dense=[1.5, 1.52], experts=[1.3, 1.32], shorter=[1.35, 1.36])
    assert verdict(found)["headline"].startswith("Experts wins. ")


def test_what_is_judged_is_the_score_on_all_held_out_text():
    found = results(dense=[1.5, 1.52], experts=[1.3, 1.32])
    found["arms"]["experts"]["finals"] = {"0": 1.6, "1": 1.61}
    assert verdict(found)["outcomes"] == {"experts": "loses"}


def test_a_win_on_flops_that_the_clock_takes_back_is_said_so():
    said = verdict(results(seconds={"experts": 2.0}, dense=[1.5, 1.52], experts=[1.3, 1.32]))
    assert said["headline"].startswith("Experts wins on FLOPs, dense on the clock.")
    assert "but not sooner: it takes 1.60 times more time" in said["headline"]


def test_it_says_so_when_dense_wins():
    said = verdict(results(dense=[1.3, 1.31], experts=[1.5, 1.51], other=[1.6, 1.6]))
    assert said["outcomes"] == {"experts": "loses", "other": "loses"}
    assert said["headline"] == "Dense wins: every other arm ends with a higher loss."
    assert "Dense reaches experts' final loss" in said["arms"]["experts"]


def test_it_says_so_when_seeds_disagree():
    said = verdict(results(dense=[1.5, 1.5], experts=[1.45, 1.55]))
    assert said["outcomes"] == {"experts": "seeds disagree"}
    assert said["headline"].startswith("No arm beats dense beyond doubt: the seeds disagree about experts.")
    # Agreement in sign alone is not enough when the seeds differ more than the arms.
    said = verdict(results(dense=[1.5, 1.5], experts=[1.4999, 1.44]))
    assert said["outcomes"] == {"experts": "leans"}
    assert said["headline"] == (
        "No arm beats dense beyond doubt: experts ends lower by no more than luck may do. More seeds would tell."
    )
    assert "2.0% lower loss than dense (-4.0% to -0.0% over 2 seeds), which may be luck." in said["arms"]["experts"]
    higher = verdict(results(dense=[1.5, 1.5], experts=[1.5001, 1.56], other=[1.6, 1.6]))
    assert higher["headline"] == "Dense ends lowest, experts higher by no more than luck may do. More seeds would tell."


def test_one_seed_leans():
    said = verdict(results(dense=[1.5], experts=[1.3]))
    assert said["outcomes"] == {"experts": "leans"}
    assert said["headline"].startswith(
        "Experts ends lowest, in one seed: more would tell whether by luck. experts ends with 13.3%"
    )
    assert "Experts reaches dense's final loss with 1.25 times fewer FLOPs" in said["headline"]
    said = verdict(results(dense=[1.3], experts=[1.5]))
    assert said["headline"] == "Dense ends lowest, in one seed: more would tell whether by luck."
    assert "Dense reaches experts' final loss" in said["arms"]["experts"]


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_luck_wins_no_more_often_than_the_level_says_and_more_seeds_find_what_is_there(seeds):
    """Without an effect a tenth of the studies see one; of an effect of three spreads three seeds find most."""
    lucky, found = random.Random(seeds), 0
    races = [[0.01 * lucky.gauss() for _ in range(seeds)] for _ in range(4000)]
    called = sum(not low <= 0 <= high for low, high in map(interval, races)) / len(races)
    assert called == pytest.approx(0.1, abs=0.02)
    found = sum(interval([d - 0.03 for d in race])[1] < 0 for race in races) / len(races)
    assert found > {2: 0.3, 3: 0.85, 5: 0.99, 12: 0.99}[seeds]


@pytest.mark.parametrize("finals", [[1.5005], [1.501, 1.499], [1.501, 1.502]])
def test_losses_too_near_to_tell_are_level(finals):
    said = verdict(results(dense=[1.5] * len(finals), experts=finals))
    assert said["outcomes"] == {"experts": "even"}
    assert said["headline"] == "No arm beats dense: experts ends within 0.5% of its loss."


def test_three_seeds_that_agree_decide_what_two_do_not():
    assert verdict(results(dense=[1.5] * 3, experts=[1.498, 1.4985, 1.4979]))["outcomes"] == {"experts": "wins"}


def test_it_says_so_when_the_budget_is_too_small():
    short = verdict(results(steps=(50, 100, 150, 199), dense=[1.5], experts=[1.3]))
    assert short["headline"] == "The budget is too small to tell: the shortest runs have 199 steps, fewer than 200."
    assert any(line.startswith("One seed") for line in short["cautions"])
    crossing = results(dense=[1.5, 1.5], experts=[1.3, 1.3])
    for curve in crossing["arms"]["experts"]["curves"].values():
        curve["bits_per_byte"][:-2] = [3.0] * (len(STEPS) - 2)
    assert "the order of experts and dense still changed in the last quarter" in verdict(crossing)["headline"]


def on_less(found, name, share):
    """The arm's runs were that much shorter."""
    arm = found["arms"][name]
    arm |= {"share_of_budget": share, "flops": arm["flops"] * share, "seconds": arm["seconds"] * share}
    return found


def test_an_arm_as_good_on_less_of_the_budget_says_how_much_less():
    found = on_less(results(seconds={"short": 1.2}, dense=[1.5, 1.5], short=[1.502, 1.499]), "short", 0.6)
    said = verdict(found)
    assert said["outcomes"] == {"short": "even"}
    assert "on 60% of the budget, ends level with dense" in said["arms"]["short"]
    assert said["arms"]["short"].endswith("Its runs took 1.67 times fewer FLOPs and 1.39 times less time.")
    found = on_less(results(seconds={"short": 2.0}, dense=[1.5, 1.5], experts=[1.3, 1.3], short=[1.47, 1.471]), "short", 0.6)
    head, _, less = verdict(found)["headline"].partition(" With decayed rates on 60% of the budget, ")
    assert head.startswith("Experts wins.")
    assert less == "short ends with a lower loss than dense's: its runs took 1.67 times fewer FLOPs and 1.20 times more time."


def test_a_loss_on_less_of_the_budget_is_said_to_be_one():
    found = on_less(results(dense=[1.3, 1.31], experts=[1.5, 1.51], short=[1.6, 1.6]), "short", 0.6)
    assert verdict(found)["headline"] == "Dense wins: every other arm ends with a higher loss (short on less of the budget)."


def test_an_arm_meant_to_end_level_does_not_make_the_budget_too_small():
    crossing = on_less(results(dense=[1.5, 1.5], short=[1.48, 1.48]), "short", 0.6)
    for curve in crossing["arms"]["short"]["curves"].values():
        curve["bits_per_byte"][:-2] = [3.0] * (len(STEPS) - 2)
    assert not verdict(crossing)["headline"].startswith("The budget is too small")


def test_an_unfinished_study_says_so():
    assert verdict(results(complete=False, dense=[1.5], experts=[1.3]))["headline"].startswith("Not finished: 1 of 4 runs")
    none = verdict(results(complete=False, dense=[1.5], experts=[]))
    assert none["arms"]["experts"].endswith("no finished run to compare yet.")


def test_a_rate_below_one_that_diverged_is_not_at_the_sweeps_end():
    found = results(dense=[1.5, 1.5], experts=[1.3, 1.3])
    found["arms"]["experts"]["sweep"] = [{"factor": f, "bits_per_byte": 2 - f if f < 2 else None} for f in (0.5, 1.0, 2.0)]
    assert found["arms"]["experts"]["learning_rate_factor"] == 1
    assert "sweep's end" not in "\n".join(verdict(found)["cautions"])


def test_cautions_name_the_sweeps_end_divergence_and_a_busy_machine():
    found = results(dense=[1.5, 1.5], experts=[1.3, 1.3])
    found["arms"]["experts"]["sweep"] = [{"factor": f, "bits_per_byte": 2 - f} for f in (0.5, 1.0)]
    found["arms"]["experts"]["diverged"] = [{"seed": 2, "message": "x"}]
    found["arms"]["dense"]["wall_seconds"] = {"mean": 1500.0}
    cautions = "\n".join(verdict(found)["cautions"])
    assert "experts: the learning rate that its sweep chose (x 1) is at the sweep's end" in cautions
    assert "experts, seed 2: training diverged" in cautions
    assert "dense: its steps took 1,500.0 s of wall clock in the runs and 1,000.0 s by the timing in turn" in cautions


def test_cache_decode_rate_and_acceptance_are_said_where_they_differ():
    rows = [{"arm": arm, "context": c, "batch": 8, "tokens_per_second": rate * c} for c in (512, 2048)
            for arm, rate in (("mha", 1.0), ("latent", 1.5))]  # fmt: skip
    found = results(decode=rows, mha=[1.5, 1.5], latent=[1.501, 1.499])
    found["arms"]["latent"]["kv_cache_bytes_per_token"] = 100
    found["arms"]["latent"]["acceptance"] = [0.8, 0.5]
    found["arms"]["latent"]["drafting"] = {"plain": 1000.0, "drafted": 1200.4}
    said = verdict(found)["arms"]["latent"]
    assert "Its cache is 7.0 times smaller; it decodes 1.50 times as fast at context 2,048, batch 8" in said
    assert "its drafts agree with it 80%, 50% of the time; with them one text at a time is made at 1,200 tokens/s" in said


@pytest.mark.parametrize(
    ("low", "median", "high", "said"),
    [
        (1.06, 1.3, 1.5, "1.30 times as fast at context 512, batch 8 (1.06 to 1.50 in the middle half of 40 rounds)."),
        (1.04, 1.3, 1.5, None),
        (0.7, 1.3, 1.5, None),
        (0.7, 0.8, 0.94, "It decodes 0.80 times as fast"),
        (0.7, 0.8, 0.96, None),
    ],
)
def test_a_decode_rate_is_said_if_the_rounds_agree_on_it(low, median, high, said):
    rows = [{"arm": arm, "context": 512, "batch": 8, "tokens_per_second": rate, "rounds": 40}
            for arm, rate in (("mha", 1.0), ("latent", median), ("short", 1.0))]  # fmt: skip
    rows[1]["over_first"] = {"low": low, "median": median, "high": high}
    rows[2]["same_as"] = "mha"
    sentences = verdict(results(decode=rows, mha=[1.5, 1.5], latent=[1.5, 1.5], short=[1.5, 1.5]))["arms"]
    assert (said in sentences["latent"]) if said else ("decodes" not in sentences["latent"])
    assert "decodes" not in sentences["short"]


def test_medians_alone_speak_where_they_are_far_apart():
    rows = [{"arm": arm, "context": 512, "batch": 8, "tokens_per_second": rate}
            for arm, rate in (("mha", 1.0), ("latent", 1.36), ("near", 1.34), ("slow", 0.73))]  # fmt: skip
    losses = {arm: [1.5, 1.5] for arm in ("mha", "latent", "near", "slow")}
    said = verdict(results(decode=rows, **losses))["arms"]
    assert "It decodes 1.36 times as fast at context 512, batch 8 (medians only: their spread was not kept)." in said["latent"]
    assert "decodes" not in said["near"] and "decodes 0.73 times as fast" in said["slow"]


def test_the_best_arm_is_that_of_all_held_out_text_over_seeds_that_both_have():
    found = results(dense=[1.5, 1.52], experts=[1.3, 1.32], other=[1.4, 1.41])
    assert best(found) == "experts"
    found["arms"]["experts"]["finals"] = {"0": 1.6, "1": 1.61}
    assert best(found) == "other"
    # A lucky seed alone is compared with the first arm's same seed, not with its mean.
    assert best(results(dense=[1.3, 1.7], experts=[1.31])) == "dense"
    assert best(results(dense=[], experts=[1.5], other=[1.4])) == "other"
    assert best(results(dense=[], experts=[])) is None


def test_what_takes_as_much_is_not_said_to_take_more():
    said = verdict(results(seconds={"experts": 1.25}, dense=[1.5, 1.5], experts=[1.3, 1.3]))["arms"]["experts"]
    assert "1.25 times fewer FLOPs and in about as much time." in said
    said = verdict(results(seconds={"experts": 1.25}, dense=[1.5, 1.5], experts=[1.28, 1.32]))["arms"]["experts"]
    assert "in about as much (1.02 times more to 1.03 times less) time." in said


def test_results_that_do_not_say_how_often_text_was_read_have_a_verdict():
    found = results(dense=[1.5, 1.5], experts=[1.3, 1.3])
    for arm in found["arms"].values():
        del arm["passes"]
    assert verdict(found)["outcomes"] == {"experts": "wins"}


def test_an_arm_without_a_judge_says_so():
    found = results(dense=[], experts=[1.3])
    found["arms"]["dense"]["diverged"] = [{"seed": 0, "message": "x"}]
    said = verdict(found)
    assert said["headline"] == "No verdict on experts: no run of it can be compared."
    assert said["arms"]["experts"] == "experts: dense diverged, which it is judged against."


def test_a_tie_on_the_clock_is_no_loss_there():
    found = results(dense=[1.5, 1.5], experts=[1.3, 1.3])
    found["sooner"]["experts"]["dense"]["seconds"] = {"mean": 0.998, "least": 0.997, "most": 0.999}
    said = verdict(found)["headline"]
    assert said.startswith("Experts wins. ") and "in about as much time" in said and "not sooner" not in said
