"""The verdict in plain words: who wins against the first arm, by how much, and how far that can be trusted."""

from __future__ import annotations

import math
import statistics
from typing import Any

from cadre.data.batches import MANY_PASSES, REPEATED

# With fewer than three seeds, losses nearer than this share are luck as likely as not; with more, the seeds themselves say.
NEAR = 0.005
FEW_SEEDS = 3
# How sure a win is: 90%, two-sided, by Student's t over the differences of the seeds. Its quantiles by degrees of freedom; with
# more the last one errs on the safe side.
_QUANTILES = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
# A curve ends too early to tell when it is this short.
FEW_STEPS = 200
# Or when the order of two arms at this part of the run is not the one at its end.
LATE = 0.75
# The share by which a run's own clock may differ from the time measured in turn before it is worth a word.
_NOISE = 0.25
# A decode rate is worth a word if the middle half of the rounds lies beyond the first share; where only medians were kept, if
# they are more than the second apart: those of one model, timed as if it were two, were 30% apart.
_FASTER, _MEDIANS_FASTER = 0.05, 0.35

# LEANS: all seeds say the same, and it may still be luck.
WINS, LOSES, EVEN, LEANS, SPLIT, UNKNOWN = "wins", "loses", "even", "leans", "seeds disagree", "unknown"


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """`headline`, `arms` (a sentence each against the first arm), `cautions`, and `outcomes` by arm: one of the above."""
    first, arms = results["first"], results["arms"]
    others = [name for name in arms if name != first]
    learned = by_heart(results)
    unfair = {name for name in others if not {name, first}.isdisjoint(learned)}
    outcomes = {name: UNKNOWN if name in unfair else outcome(results, name) for name in others}
    cautions = _cautions(results, outcomes)
    return {
        "headline": _headline(results, outcomes, too_small(results, outcomes)),
        "arms": {name: _against(results, name, outcomes[name]) for name in others},
        "cautions": cautions,
        "outcomes": outcomes,
    }


def best(results: dict[str, Any]) -> str | None:
    """The arm with the lowest loss on all held-out text, by the seeds that it shares with the first arm; None before any
    run is done. Without runs of the first arm each arm's own seeds count."""
    scored = {name: finals for name, arm in results["arms"].items() if (finals := _finals(arm))}
    if results["first"] in scored:
        gaps = {name: found for name in scored if (found := differences(results, name))}
        return min(gaps, key=lambda name: statistics.fmean(gaps[name]))
    return min(scored, key=lambda name: statistics.fmean(scored[name].values()), default=None)


def differences(results: dict[str, Any], name: str) -> list[float]:
    """Final loss of the arm over the first arm's, less 1, of each seed that both finished."""
    here, there = (_finals(results["arms"][arm]) for arm in (name, results["first"]))
    return [here[seed] / there[seed] - 1 for seed in here if seed in there]


def interval(found: list[float]) -> tuple[float, float] | None:
    """Where the mean of ever more seeds' differences would lie, at 90%, if they are normally distributed; None for one."""
    if len(found) < 2:
        return None
    mean = statistics.fmean(found)
    reach = _QUANTILES[min(len(found) - 1, len(_QUANTILES)) - 1] * statistics.stdev(found) / math.sqrt(len(found))
    return mean - reach, mean + reach


def outcome(results: dict[str, Any], name: str) -> str:
    """How the arm's final losses compare with the first arm's over the seeds they share."""
    found = differences(results, name)
    if not found:
        return UNKNOWN
    mean, mixed, few = statistics.fmean(found), min(found) < 0 < max(found), len(found) < FEW_SEEDS
    if few and (max(abs(d) for d in found) if mixed else abs(mean)) < NEAR:
        return EVEN
    if (bounds := interval(found)) is None:
        return LEANS
    low, high = bounds
    if low > 0 or high < 0:
        return WINS if mean < 0 else LOSES
    if max(-low, high) < NEAR:
        return EVEN
    return SPLIT if mixed else LEANS


def risen(arm: dict[str, Any]) -> float:
    """By which share the arm's held-out loss ends above the lowest it had, over its seeds."""
    ends = [curve["bits_per_byte"][-1] / min(curve["bits_per_byte"]) - 1 for curve in arm["curves"].values()]
    return statistics.fmean(ends) if ends else 0.0


def by_heart(results: dict[str, Any]) -> list[str]:
    """The arms that learned the text by heart: they read it often enough, and their held-out loss ends above its lowest."""
    return [name for name, arm in results["arms"].items() if risen(arm) > NEAR and _passes(arm) > REPEATED]


def too_small(results: dict[str, Any], outcomes: dict[str, str]) -> list[str]:
    """The reasons why the budget is too small to tell, none if it is not."""
    reasons = []
    shortest = min(results["arms"].values(), key=lambda arm: arm["steps"])
    if shortest["steps"] < FEW_STEPS:
        reasons.append(f"the shortest runs have {shortest['steps']} steps, fewer than {FEW_STEPS}")
    for name, found in outcomes.items():
        if _share(results, name) < 1:
            continue  # meant to end level: its order says nothing of the budget
        early, late = _lead(results, name, LATE), _lead(results, name, 1.0)
        if found in (WINS, LOSES, LEANS) and early is not None and late is not None and early * late < 0:
            reasons.append(f"the order of {name} and {results['first']} still changed in the last quarter of the runs")
    return reasons


def _headline(results: dict[str, Any], outcomes: dict[str, str], small: list[str]) -> str:
    first = results["first"]
    if not results["complete"]:
        return f"Not finished: {results['runs_done']} of {results['runs']} runs are done. What follows is what they say so far."
    if small:
        return f"The budget is too small to tell: {'; '.join(small)}."
    if learned := by_heart(results):
        passes = max(_passes(arm) for arm in results["arms"].values())
        return (f"No verdict: {listed(learned)} learned the text by heart, so that held-out loss rose again. The runs read it "
                f"up to {passes:,.1f} times: give more text, or a smaller budget.")  # fmt: skip
    winners = [name for name, found in outcomes.items() if found == WINS]
    if winners:
        winner = min(winners, key=lambda name: _mean(results, name))
        if all(_slower(results, name) for name in winners):
            said = f"{_capital(winner)} wins on FLOPs, {first} on the clock. {_against(results, winner, WINS)}"
        else:
            said = f"{_capital(winner)} wins. {_against(results, winner, WINS)}"
        return " ".join(filter(None, [said, _with_less(results, outcomes, winner)]))
    lower = [name for name, found in outcomes.items() if found == LEANS and _mean(results, name) < 0]
    split = [name for name, found in outcomes.items() if found == SPLIT]
    if lower and len(results["seeds"]) == 1:
        lowest = min(lower, key=lambda name: _mean(results, name))
        said = _against(results, lowest, LEANS)
        return f"{_capital(lowest)} ends lowest, in one seed: more would tell whether by luck. {said}"
    if lower or split:
        doubts = [f"the seeds disagree about {listed(split)}"] if split else []
        doubts += [f"{listed(lower)} end{'s' if len(lower) == 1 else ''} lower by no more than luck may do"] if lower else []
        return f"No arm beats {first} beyond doubt: {'; '.join(doubts)}. More seeds would tell."
    if UNKNOWN in outcomes.values():
        return f"No verdict on {listed([n for n, f in outcomes.items() if f == UNKNOWN])}: no run of it can be compared."
    if EVEN in outcomes.values():
        even = [name for name, found in outcomes.items() if found == EVEN]
        return f"No arm beats {first}: {listed(even)} end{'s' if len(even) == 1 else ''} within {NEAR:.1%} of its loss."
    less = [name for name in outcomes if _share(results, name) < 1]
    but = f" ({listed(less)} on less of the budget)" if less else ""
    unsure = [name for name, found in outcomes.items() if found == LEANS]
    if unsure and len(results["seeds"]) == 1:
        return f"{_capital(first)} ends lowest, in one seed: more would tell whether by luck{but}."
    if unsure:
        return (
            f"{_capital(first)} ends lowest, {listed(unsure)} higher by no more than luck may do. More seeds would tell{but}."
        )
    return f"{_capital(first)} wins: every other arm ends with a higher loss{but}."


def _mean(results: dict[str, Any], name: str) -> float:
    return statistics.fmean(differences(results, name))


def _slower(results: dict[str, Any], name: str) -> bool:
    """Whether the arm is known to reach the first one's final loss no sooner."""
    pace = results["sooner"][name][results["first"]]["seconds"]
    return bool(pace) and round(pace["mean"], 2) < 1


def _share(results: dict[str, Any], name: str) -> float:
    return float(results["arms"][name]["share_of_budget"])


def _with_less(results: dict[str, Any], outcomes: dict[str, str], named: str) -> str:
    """The arm that did as well as the first on the smallest part of the budget: its rates have decayed, so it answers exactly
    what a crossing of curves understates."""
    good = [name for name, found in outcomes.items() if found in (WINS, EVEN) and _share(results, name) < 1 and name != named]
    if not good:
        return ""
    least = min(good, key=lambda name: _share(results, name))
    how = "a lower loss than" if outcomes[least] == WINS else "a loss level with"
    return (f"With decayed rates on {_share(results, least):.0%} of the budget, {least} ends with {how} "
            f"{possessive(results['first'])}: {_whole(results, least)}")  # fmt: skip


def _whole(results: dict[str, Any], name: str) -> str:
    """What whole runs of the arm took against those of the first."""
    here, there = results["arms"][name], results["arms"][results["first"]]
    flops, seconds = there["flops"] / here["flops"], there["seconds"] / here["seconds"]
    return f"its runs took {_factor(flops, 'fewer', 'more')} FLOPs and {_factor(seconds, 'less', 'more')} time."


def _factor(factor: float, less: str, more: str) -> str:
    return f"{factor:.2f} times {less}" if factor >= 1 else f"{1 / factor:.2f} times {more}"


def _against(results: dict[str, Any], name: str, found: str) -> str:
    """One arm against the first, in a few sentences."""
    first = results["first"]
    gaps = differences(results, name)
    if not gaps:
        for diverged in (name, first):
            if results["arms"][diverged]["diverged"] and not _finals(results["arms"][diverged]):
                return f"{name}: " + (
                    "training diverged." if diverged == name else f"{first} diverged, which it is judged against."
                )
        return f"{name}: " + ("no seed to compare." if results["complete"] else "no finished run to compare yet.")
    mean = statistics.fmean(gaps)
    part = results["arms"][name]["share_of_budget"]
    of = "" if part == 1 else f", on {part:.0%} of the budget,"
    range_ = f" ({min(gaps):+.1%} to {max(gaps):+.1%} over {len(gaps)} seeds)" if len(gaps) > 1 else " (one seed)"
    if found == SPLIT:
        text = f"{name} and {first}{of}: the seeds disagree, its final loss differs by {mean:+.1%}{range_}."
    elif found == EVEN:
        text = f"{name}{of} ends level with {first}: {mean:+.1%} loss{range_}."
    else:
        but = {UNKNOWN: ", the text learned by heart", LEANS: ", which may be luck" if len(gaps) > 1 else ""}.get(found, "")
        text = f"{name}{of} ends with {abs(mean):.1%} {'lower' if mean < 0 else 'higher'} loss than {first}{range_}{but}."
    return " ".join(filter(None, [text, _time(results, name, found), _beside(results, name)]))


def _time(results: dict[str, Any], name: str, found: str) -> str:
    first = results["first"]
    if not {name, first}.isdisjoint(by_heart(results)):
        return ""  # a loss that rose is reached early by anything
    higher = found == LOSES or (found == LEANS and _mean(results, name) > 0)
    fast, slow = (first, name) if higher else (name, first)
    pair = results["sooner"][fast][slow]
    if found == EVEN and _share(results, name) < 1:
        return _capital(_whole(results, name))
    if found in (SPLIT, EVEN) or not pair["seconds"]:
        return ""
    flops, seconds = pair["flops"], pair["seconds"]
    some = f" ({where})" if (where := in_some_seeds(pair)) else ""
    time = _times(seconds, "less", "more", "much")
    text = f"{_capital(fast)} reaches {possessive(slow)} final loss with {_times(flops, 'fewer', 'more', 'many')} FLOPs"
    if flops["mean"] > 1 > round(seconds["mean"], 2):
        why = "since its steps cost more than their FLOPs say"
        return f"{text}{some}, but not sooner: it takes {time} time on this machine, {why}."
    return f"{text} and in {time} time{some}."


def _beside(results: dict[str, Any], name: str) -> str:
    """Cache and decode rate, where they differ."""
    here, there = results["arms"][name], results["arms"][results["first"]]
    said = []
    ratio = there["kv_cache_bytes_per_token"] / here["kv_cache_bytes_per_token"]
    if abs(ratio - 1) > 0.02:
        said.append(f"its cache is {ratio:.1f} times smaller" if ratio > 1 else f"its cache is {1 / ratio:.1f} times larger")
    if decoding := _decoding(results, name):
        said.append(decoding)
    if here["acceptance"]:
        said.append("its drafts agree with it " + ", ".join(f"{a:.0%}" for a in here["acceptance"]) + " of the time")
    if (rates := here.get("drafting")) is not None:
        said.append(
            f"with them one text at a time is made at {rates['drafted']:,.0f} tokens/s, without at {rates['plain']:,.0f}"
        )
    return _capital("; ".join(said)) + "." if said else ""


def _decoding(results: dict[str, Any], name: str) -> str:
    """How fast the arm decodes at the longest context and largest batch, if beyond what rounds differ by anyway."""
    rows = {(row["arm"], row["context"], row["batch"]): row for row in results["decode"] if row.get("tokens_per_second")}
    points = [(c, b) for arm, c, b in rows if arm == name and (results["first"], c, b) in rows]
    if not points:
        return ""
    context, batch = max(points)
    row, first = rows[name, context, batch], rows[results["first"], context, batch]
    where = f"at context {context:,}, batch {batch}"
    if "rounds" in row:
        over = row.get("over_first")  # not of the first arm's own shape
        if over is None or (over["low"] <= 1 + _FASTER and over["high"] >= 1 / (1 + _FASTER)):
            return ""
        range_ = f"{over['low']:.2f} to {over['high']:.2f} in the middle half of {row['rounds']} rounds"
        return f"it decodes {over['median']:.2f} times as fast {where} ({range_})"
    speed = row["tokens_per_second"] / first["tokens_per_second"]
    if 1 / (1 + _MEDIANS_FASTER) <= speed <= 1 + _MEDIANS_FASTER:
        return ""
    return f"it decodes {speed:.2f} times as fast {where} (medians only: their spread was not kept)"


def _cautions(results: dict[str, Any], outcomes: dict[str, str]) -> list[str]:
    small = [] if results["complete"] else too_small(results, outcomes)  # else the headline says so
    said = [f"The budget may be too small to tell: {reason}." for reason in small]
    if len(results["seeds"]) == 1:
        said.append("One seed: how far luck reaches is not known from this study.")
    for name, arm in results["arms"].items():
        if (share := risen(arm)) > NEAR:
            said.append(f"{name}: its held-out loss ends {share:.1%} above the lowest it had.")
    passes = max(_passes(arm) for arm in results["arms"].values())
    if passes > MANY_PASSES:
        said.append(f"The longest runs read the text {passes:,.1f} times: beyond {MANY_PASSES} times it teaches less and less.")
    for name, arm in results["arms"].items():
        tried, used = [point["factor"] for point in arm["sweep"]], arm["learning_rate_factor"]
        if len(tried) > 1 and used in (min(tried), max(tried)):
            said.append(f"{name}: the learning rate that its sweep chose (x {used:g}) is at the sweep's end; a rate beyond it "
                        "may be better still.")  # fmt: skip
        for run in arm["diverged"]:
            said.append(f"{name}, seed {run['seed']}: training diverged, so the run is left out.")
        drift = arm["step_seconds"] / arm["step_seconds_before"] - 1
        own = arm["wall_seconds"]
        if own and abs(own["mean"] / arm["seconds"] - 1) > _NOISE:
            said.append(f"{name}: its steps took {own['mean']:,.1f} s of wall clock in the runs and {arm['seconds']:,.1f} s by "
                        "the timing in turn, which is used: the machine was busy with other work in one.")  # fmt: skip
        elif abs(drift) > _NOISE:
            said.append(f"{name}: a step took {abs(drift):.0%} {'longer' if drift > 0 else 'less'} after the runs than before.")
    factors = {arm["learning_rate_factor"] for arm in results["arms"].values()}
    if not any(arm["sweep"] for arm in results["arms"].values()) and factors != {None}:
        said.append("Learning rates were not swept: the arms ran at their recipes' own.")
    return said


def _finals(arm: dict[str, Any]) -> dict[str, float]:
    """Of each seed, the score on all held-out text, which the points of a curve are a sample of."""
    return {seed: arm["finals"][seed] for seed in arm["curves"] if seed in arm["finals"]}


def _passes(arm: dict[str, Any]) -> float:
    """How often the arm's runs read the text; results of long ago do not say, and have no word on it."""
    return float(arm.get("passes", 0))


def _lead(results: dict[str, Any], name: str, part: float) -> float | None:
    """Mean loss of the arm less the first's at a part of their runs, over the seeds they share."""
    here, there = results["arms"][name]["curves"], results["arms"][results["first"]]["curves"]
    gaps = [_at(here[seed], part) - _at(there[seed], part) for seed in here if seed in there]
    return statistics.fmean(gaps) if gaps else None


def _at(curve: dict[str, list[float]], part: float) -> float:
    steps = curve["steps"]
    place = min(range(len(steps)), key=lambda i: abs(steps[i] - part * steps[-1]))
    return curve["bits_per_byte"][place]


def _times(factor: dict[str, float], less: str, more: str, same: str) -> str:
    """1.5 -> "1.50 times fewer", 0.5 -> "2.00 times more", 1.001 -> "about as many"; with the range over seeds where it is
    wide enough to matter."""

    def said(value: float) -> str:
        return f"{value:.2f} times {less}" if value >= 1 else f"{1 / value:.2f} times {more}"

    mean, low, high = (factor[key] for key in ("mean", "least", "most"))
    level = f"{mean:.2f}" == "1.00"
    if high - low < 0.05:
        return f"about as {same}" if level else said(mean)
    if level or low < 1 < high:
        return f"{f'about as {same}' if level else said(mean)} ({said(low)} to {said(high)})"
    ends = sorted((low, high) if mean >= 1 else (1 / low, 1 / high))
    number, _, word = said(mean).rpartition(" ")
    return f"{number} ({ends[0]:.2f} to {ends[1]:.2f}) {word}"


def in_some_seeds(pair: dict[str, Any]) -> str:
    """Of a factor by which an arm is sooner: in how many of the seeds it gets there at all, if not in all of them."""
    return "" if pair["reached"] == pair["seeds"] else f"in {pair['reached']} of {pair['seeds']} seeds"


def possessive(name: str) -> str:
    """dense's, four-layers'."""
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
