"""From a budget to runs: steps by FLOPs, tokens, seconds and price, and how long all of it takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.study.jobs import LEAST_STEPS, START_SECONDS, amount_for, evaluating, plan_jobs, recipe_of, seconds_of, steps_of
from cadre.study.match import match
from cadre.study.spec import Budget, parse_study
from tests.study.studies import study_text

SECONDS = {"dense": 0.5, "experts": 0.75}


def tiny(*replace):
    text = study_text()
    for what, by in replace:
        assert what in text
        text = text.replace(what, by)
    study = parse_study(text, "tiny.toml", "tiny")
    return study, match(study, study.base_recipe(), 300)


def test_steps_are_what_the_budget_pays_for():
    study, (dense, experts) = tiny()
    steps = {}
    for budget in (Budget(tokens=6400), Budget(flops=dense.flops_per_token * 6400), Budget(seconds=50), Budget(usd=0.1)):
        chosen = study.model_copy(update={"budget": budget})
        steps[budget.unit] = [steps_of(chosen, arm, SECONDS[arm.name], 7.2) for arm in (dense, experts)]
    assert steps["tokens"] == [100, 100]
    assert steps["flops"] == [100, int(100 * dense.flops_per_token / experts.flops_per_token)]
    assert steps["seconds"] == [100, 66]
    # 0.1 dollars at 7.2 an hour are 50 seconds.
    assert steps["usd"] == [100, 66]


def test_an_arm_gets_its_share():
    study, (dense, experts) = tiny(("[arms.experts]\n", "[arms.experts]\nshare = 0.5\n"))
    assert steps_of(study, experts, 1.0, 1.0) * 2 == steps_of(study, dense, 1.0, 1.0)


def test_sweeps_come_first_then_seed_by_seed_every_arm():
    study, arms = tiny()
    jobs = plan_jobs(study, arms, SECONDS, 1.0, 6400)
    assert [job.folder for job in jobs] == [
        "sweep/dense-x1", "sweep/dense-x3", "sweep/experts-x1", "sweep/experts-x3",
        "runs/dense-seed0", "runs/experts-seed0", "runs/dense-seed1", "runs/experts-seed1",
    ]  # fmt: skip
    assert [job.steps for job in jobs] == [50] * 4 + [100] * 4
    assert all(job.factor is None for job in jobs[4:])
    alone = plan_jobs(study.shortened(), arms, SECONDS, 1.0, 6400)
    assert [(job.folder, job.factor) for job in alone] == [("runs/dense-seed0", 1.0), ("runs/experts-seed0", 1.0)]


def test_a_budget_below_a_calibration_is_refused():
    study, arms = tiny()
    said = r"budget of 1.28e\+03 tokens is too small: a sweep over 50% of it is 10 steps of arm dense"
    with pytest.raises(UsageError, match=said):
        plan_jobs(study, arms, SECONDS, 1.0, 1280)
    with pytest.raises(UsageError, match=r"it is 0\.00781 steps of arm dense, .* give at least 2,560 times as much"):
        plan_jobs(study, arms, SECONDS, 1.0, 1)
    with pytest.raises(UsageError, match=r"0.1 minutes are too few: its 8 runs need at least \d+ minutes"):
        amount_for(study, arms, SECONDS, 1.0, 6, 1000)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 10), st.floats(0.001, 2), st.floats(0.001, 2), st.sampled_from(["flops", "seconds", "usd"]))
def test_minutes_are_met_whatever_the_budgets_unit(hours, dense, experts, unit):
    study, arms = tiny()
    study = study.model_copy(update={"budget": Budget(**{unit: 1.0})})
    seconds = {"dense": dense, "experts": experts}
    amount = amount_for(study, arms, seconds, 3.0, hours * 3600, 500)
    jobs = plan_jobs(study, arms, seconds, 3.0, amount)
    assert min(job.steps for job in jobs) >= LEAST_STEPS
    runs = {name: sum(job.arm == name for job in jobs) for name in seconds}
    total = sum(
        seconds_of(job, seconds[job.arm], evaluating(study, arm, seconds[arm.name], 500) / runs[arm.name])
        for job in jobs for arm in arms if arm.name == job.arm
    )  # fmt: skip
    assert total == pytest.approx(hours * 3600, rel=0.1) and total <= hours * 3600
    assert total > len(jobs) * START_SECONDS


def test_a_jobs_recipe_is_the_arms_over_its_steps():
    study, (dense, _) = tiny(("[recipe.optimizer]\n", "[recipe.optimizer]\nadamw_lr = 0.01\n"))
    job = plan_jobs(study, [dense], SECONDS, 1.0, 6400)[-1]
    recipe = recipe_of(job, dense.recipe, 3.0, 5, "bfloat16")
    assert (recipe.train.steps, recipe.train.seed, recipe.train.dtype) == (100, 1, "bfloat16")
    assert (recipe.optimizer.lr, recipe.optimizer.adamw_lr) == pytest.approx((0.009, 0.03))
    assert (recipe.schedule.warmup_steps, recipe.eval.every, recipe.eval.prompts) == (10, 20, [])
    assert recipe.model == dense.recipe.model and recipe.data == dense.recipe.data


def test_no_run_keeps_its_best_model_though_the_base_recipe_does():
    study, (dense, _) = tiny()
    keeping = dense.recipe.model_copy(update={"checkpoint": dense.recipe.checkpoint.model_copy(update={"best": True})})
    for job in plan_jobs(study, [dense], SECONDS, 1.0, 6400):
        assert not recipe_of(job, keeping, 1.0, 5, "float32").checkpoint.best


def test_a_sweep_is_evaluated_at_its_end_alone():
    study, (dense, experts) = tiny()
    first, *_, last = plan_jobs(study, [dense, experts], SECONDS, 1.0, 6400)
    assert recipe_of(first, dense.recipe, 1.0, 5, "float32").eval.every == first.steps == 50
    tokens = dense.recipe.train.batch * dense.recipe.data.seq_len
    short, whole = dense.recipe.eval.tokens, 1000
    read = len(study.seeds) * ((study.evaluations + 1) * short + 2 * whole) + len(study.sweep.factors) * short
    assert evaluating(study, dense, 1.0, whole) == pytest.approx(0.4 * read / tokens)
    assert recipe_of(last, experts.recipe, 1.0, 5, "float32").eval.every == 20
