import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from cadre.errors import UsageError
from cadre.infer.sampling import Sampler, Sampling, TokenOut, choose_batch, token_logprobs, uniform

# Small ones, whole blocks and not, and enough words for each way of finding the likeliest.
vocabularies = st.sampled_from([1, 7, 64, 130, 300, 1000, 20_000])
filters = st.fixed_dictionaries(
    dict(
        temperature=st.floats(0.2, 3.0),
        top_k=st.sampled_from([0, 0, 1, 3, 50, 400, 700, 10**400]),
        top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    )
)
penalties = st.fixed_dictionaries(
    dict(
        repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.7, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
    )
)


def noise(words, seed, scale=3.0):
    return torch.randn(words, generator=torch.Generator().manual_seed(seed)) * scale


def sampler(prompt=(), answer=(), constraint=None, **settings):
    made = Sampler(Sampling(**settings), prompt, constraint)
    for token in answer:
        made.accept(token)
    return made


def draws(logits, count=400, **settings):
    """Ids drawn from the same logits, each with the random number of another seed."""
    first = settings.pop("seed", 0)
    made = [sampler(seed=first + n, **settings) for n in range(count)]
    return [token.id for token in choose_batch(made, torch.tensor(logits, dtype=torch.float32).expand(count, -1))]


def reference(logits, sampling, prompt, answer):
    """Probabilities float64 [W] by transformers' processors; presence and frequency, which it lacks, by their definition."""
    ids, scores = torch.tensor([[*prompt, *answer]]), logits[None]
    if sampling.logit_bias:
        scores = theirs.SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling.logit_bias})(ids, scores)
    if sampling.repetition_penalty != 1 and ids.numel():
        scores = theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    for token in set(answer):
        scores[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * answer.count(token)
    scores = theirs.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = theirs.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = theirs.TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = theirs.MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores[0].double().softmax(-1)


@given(words=vocabularies, settings=filters, more=penalties, data=st.data())
def test_a_choice_is_where_the_distribution_of_transformers_passes_the_uniform_number(words, settings, more, data):
    tokens = st.lists(st.integers(0, words - 1), max_size=6)
    prompt, answer, biased = data.draw(tokens), data.draw(tokens), data.draw(st.sets(st.integers(0, words - 1), max_size=3))
    bias = tuple((token, data.draw(st.floats(-9, 9))) for token in sorted(biased))
    seed = data.draw(st.integers(0, 2**63 - 1))
    sampling = Sampling(**settings, **more, logit_bias=bias, seed=seed)
    logits = noise(words, seed % 1000, scale=data.draw(st.sampled_from([0.1, 1.0, 3.0])))
    made = Sampler(sampling, prompt)
    for token in answer:
        made.accept(token)
    chosen = made.choose(logits).id
    p = reference(logits.clone(), sampling, prompt, answer)
    after = float(p[: chosen + 1].sum())
    assert p[chosen] > 0
    assert after - float(p[chosen]) - 1e-5 <= uniform(seed, len(answer)) <= after + 1e-5


@given(settings=st.lists(st.tuples(filters, penalties), min_size=1, max_size=6), words=vocabularies, data=st.data())
def test_a_batch_chooses_as_its_rows_do_alone(settings, words, data):
    made, rows = [], []
    for row, (own, more) in enumerate(settings):
        if data.draw(st.booleans()):
            own = {**own, "temperature": 0.0}
        logprobs = data.draw(st.sampled_from([None, None, 0, 3]))
        tokens = st.lists(st.integers(0, words - 1), max_size=5)
        made.append(sampler(data.draw(tokens), data.draw(tokens), **own, **more, logprobs=logprobs, seed=row))
        rows.append(noise(words, row, scale=data.draw(st.sampled_from([0.1, 3.0]))).bfloat16().float())
    logits = torch.stack(rows)
    kept = logits.clone()
    batch = choose_batch(made, logits)
    assert [token.id for token in batch] == [one.choose(row).id for one, row in zip(made, rows, strict=True)]
    for token, one, row in zip(batch, made, rows, strict=True):
        alone = one.choose(row)
        assert (token.logprob is None) == (alone.logprob is None) == (one.sampling.logprobs is None)
        assert token.logprob == pytest.approx(alone.logprob, abs=1e-5)
        assert [value for _, value in token.top] == pytest.approx([value for _, value in alone.top], abs=1e-5)
    assert torch.equal(logits, kept)  # left as they were


@given(logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12), top_k=st.integers(1, 14))
def test_top_k_draws_only_from_the_k_likeliest(logits, top_k):
    least = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
    drawn = set(draws(logits, temperature=1.0, top_k=top_k))
    assert all(logits[token] >= least for token in drawn)
    assert len(drawn) <= top_k


def test_top_p_keeps_the_token_that_crosses():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draws(logits, temperature=1.0, top_p=0.6)) == {0, 1}
    assert set(draws(logits, temperature=1.0, top_p=0.45)) == {0}
    assert set(draws(logits, temperature=1.0, top_p=1e-9)) == {0}
    assert set(draws(logits, temperature=1.0, count=2000)) == {0, 1, 2, 3}


def test_top_p_counts_within_top_k_and_min_p_against_the_likeliest():
    logits = [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)]
    assert set(draws(logits, temperature=1.0, top_p=0.55, top_k=2)) == {3}  # 0.4 of 0.7 is 0.57
    assert set(draws(logits, temperature=1.0, min_p=0.6)) == {2, 3}
    assert set(draws(logits, temperature=2.0, min_p=0.6)) == {1, 2, 3}  # of temperature's distribution


@pytest.mark.parametrize("words", [300, 20_000])
def test_among_equals_the_lower_ids_are_kept(words):
    flat = [1.0] * words
    assert set(draws(flat, top_k=1)) == {0}
    assert set(draws(flat, top_k=3)) == {0, 1, 2}
    nucleus = draws(flat, temperature=1.0, top_p=0.1, count=100)
    assert max(nucleus) < words // 10
    assert max(nucleus) > words // 12
    flat[7] = 2.0
    assert set(draws(flat, top_k=3)) == {0, 1, 7}
    assert max(draws(flat, top_k=words // 2, count=50)) < words // 2


def test_top_k_of_one_is_greedy():
    for seed in range(20):
        logits = noise(500, seed, scale=0.5).bfloat16().float()  # with equals
        assert sampler(temperature=2.0, top_k=1, seed=seed).choose(logits) == sampler(temperature=0.0).choose(logits)


@given(rows=st.lists(st.permutations(range(6)), min_size=1, max_size=5))
def test_temperature_zero_is_greedy_and_low_temperature_its_limit(rows):
    logits = torch.tensor(rows, dtype=torch.float32)
    best = logits.argmax(dim=-1).tolist()
    for temperature in (0.0, 1e-3, 1e-30, 5e-324):
        made = [sampler(temperature=temperature) for _ in rows]
        assert [token.id for token in choose_batch(made, logits)] == best


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.85}],
)
def test_frequencies_follow_the_distribution(settings):
    """Chi-square at the 0.1% level, on fixed seeds."""
    logits = [-1.0, 2.0, 0.5, 0.0, 1.0]
    p = reference(torch.tensor(logits), Sampling(**settings), [0], []).numpy()
    count = 5000
    seen = np.bincount(draws(logits, count, **settings), minlength=5)
    kept = p > 0
    assert seen[~kept].sum() == 0
    chi_square = float(((seen - count * p)[kept] ** 2 / (count * p[kept])).sum())
    assert chi_square < {3: 13.82, 5: 18.47}[int(kept.sum())]


@pytest.mark.parametrize("pairs", ["positions of a seed", "seeds at a position"])
def test_uniform_numbers_are_uniform_and_independent(pairs):
    """Chi-square at the 0.1% level over 100 cells: of the numbers, and of each with the next."""
    count = 20_000
    numbers = [uniform(5, n) if pairs == "positions of a seed" else uniform(n, 5) for n in range(count + 1)]
    assert all(0 <= number < 1 for number in numbers)
    tens = np.array([int(number * 10) for number in numbers])
    for cells in ([int(number * 100) for number in numbers[:count]], tens[:-1] * 10 + tens[1:]):
        seen = np.bincount(cells, minlength=100)
        assert float(((seen - count / 100) ** 2 / (count / 100)).sum()) < 148.2


def test_uniform_numbers_stay_what_they_are():
    """A changed number would change every seeded text."""
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(2**63 - 1, 12345) == 0.1811036175971703


def test_a_position_can_be_drawn_again():
    """As after preemption, and for the drafts of speculation: only seed, position and the text so far count."""
    rows = noise(200 * 30, 0).view(30, 200)
    settings = dict(temperature=1.0, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, seed=4)
    first, text = sampler([1, 2, 3], **settings), []
    for row in rows:
        token = first.choose(row).id
        assert first.choose(row).id == token
        first.accept(token)
        text.append(token)
    for place in (0, 7, 29):
        assert sampler([1, 2, 3], text[:place], **settings).choose(rows[place]).id == text[place]
    assert len({tuple(draws(rows[0].tolist(), 20, seed=seed)) for seed in (0, 100, 200)}) == 3


def test_without_a_seed_each_sampler_draws_its_own():
    logits = torch.zeros(1000)
    assert len({sampler(temperature=1.0).choose(logits).id for _ in range(20)}) > 10


def test_rounding_in_the_logits_hardly_moves_a_draw():
    """Another batch size rounds otherwise; the texts should not part at once."""
    logits = noise(2000, 0, scale=1.0)
    other = logits * (1 + 1e-6 * noise(2000, 1, scale=1.0))
    for settings in ({}, {"top_p": 0.95}, {"top_k": 100}):
        made = [sampler(temperature=1.0, seed=seed, **settings) for seed in range(500)]
        pairs = zip(choose_batch(made, logits.expand(500, -1)), choose_batch(made, other.expand(500, -1)), strict=True)
        assert sum(one != another for one, another in pairs) <= 2


def test_penalties_count_the_answer_and_repetition_the_prompt_too():
    logits = torch.tensor([1.0, 1.0, -1.0, 1.0])
    words = dict(prompt=[1, 2], answer=[0, 0, 2], temperature=0.0)
    for settings, best in (
        ({"presence_penalty": 0.5}, 1),
        ({"frequency_penalty": -0.25}, 0),
        ({"repetition_penalty": 1.5}, 3),
        ({"repetition_penalty": 0.1}, 0),
    ):
        assert sampler(**words, **settings).choose(logits).id == best
    # The answer's 0: 1 / 2 - 2 * 0.25 - 0.1. Its 2: -1 * 2 - 0.25 - 0.1. The prompt's 1: 1 / 2.
    edited = {0: -0.1, 1: 0.5, 2: -2.35}
    both = sampler(**words, repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.1)
    for token, value in edited.items():
        alone = torch.full((4,), -50.0)
        alone[token] = logits[token]
        for rival in (value - 1e-3, value + 1e-3):
            alone[3] = rival
            assert both.choose(alone).id == (token if rival < value else 3)


def test_many_different_tokens_are_counted():
    answer = [token for token in range(300) for _ in range(1 + token % 3)]
    made = sampler(answer=answer, temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(301)
    logits[300] = -2.5
    assert made.choose(logits).id == 0
    logits[:300] = torch.tensor([float(token % 3) for token in range(300)])  # all back to -1
    logits[41] += 0.5
    assert made.choose(logits).id == 41


def test_logit_bias_bans_and_forces():
    logits = noise(50, 0)
    best = int(logits.argmax())
    assert sampler(temperature=0.0, logit_bias=((best, -100.0),)).choose(logits).id == int(logits.topk(2).indices[1])
    assert set(draws(logits.tolist(), logit_bias=((3, 100.0),))) == {3}


def test_logprobs_are_the_models_own():
    logits = noise(400, 0)
    own = logits.log_softmax(-1)
    settings = dict(temperature=0.5, repetition_penalty=1.5, top_k=5, logit_bias=((7, 50.0),))
    made = [sampler([1, 2], logprobs=count, **settings) for count in (None, 0, 3, 1000)]
    none, zero, three, all_ = choose_batch(made, logits.expand(4, -1))
    assert none == TokenOut(7)
    for token, count in ((zero, 0), (three, 3), (all_, 400)):
        assert token.id == 7
        assert token.logprob == pytest.approx(float(own[7]), abs=1e-5)
        values, ids = own.topk(count)
        assert [id for id, _ in token.top] == ids.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_of_given_tokens():
    logits = noise(3 * 70, 0).view(3, 70)
    own = logits.log_softmax(-1)
    for row, token in enumerate(token_logprobs(logits, [4, 69, 0], 2)):
        assert token.logprob == pytest.approx(float(own[row, token.id]), abs=1e-5)
        assert [id for id, _ in token.top] == own[row].topk(2).indices.tolist()
    assert [token.id for token in token_logprobs(logits, [4, 69, 0], 0)] == [4, 69, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("words", [10, 20_000])
def test_logits_that_are_not_finite_harm_no_other_row(bad, words):
    settings = [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}]
    settings += [{"top_k": 700, "top_p": 0.9}, {"logprobs": 2, "presence_penalty": 1.0}]
    for own in settings:
        made = [sampler(seed=row, **own) for row in range(3)]
        good = noise(3 * words, 0).view(3, words)
        for places in (slice(None), slice(2, 5)):
            logits = good.clone()
            logits[1, places] = bad
            tokens = choose_batch(made, logits)
            assert 0 <= tokens[1].id < words
            alone = choose_batch(made, good)
            assert (tokens[0], tokens[2]) == (alone[0], alone[2])


class Only:
    """A constraint that lets a few tokens through."""

    is_finished, error = False, None

    def __init__(self, words, allowed):
        self.allowed = np.isin(np.arange(words), allowed)
        self.accepted = []

    def mask(self):
        return self.allowed

    def accept(self, token):
        self.accepted.append(token)


@pytest.mark.parametrize("words", [64, 100])
def test_a_constraint_comes_before_all_else(words):
    logits = noise(words, 0)
    settings = dict(logit_bias=((0, 100.0),), repetition_penalty=0.001, seed=1)
    for own in ({"temperature": 0.0}, {"temperature": 5.0}, {"top_k": 2}, {"temperature": 5.0, "top_p": 0.99}):
        constraint = Only(words, [5, 9])
        made = sampler([0, 1, 2], [0, 3], constraint, **settings, **own)
        free = sampler(**own, seed=1)
        tokens = choose_batch([made, free], logits.expand(2, -1))
        assert tokens[0].id in (5, 9)
        assert tokens[1] == free.choose(logits)
        assert constraint.accepted == [0, 3]


def test_a_sampler_tells_what_its_constraint_does():
    constraint = Only(9, [1])
    made = sampler(constraint=constraint)
    assert (made.is_finished, made.error) == (False, None)
    constraint.is_finished, constraint.error = True, "it is too complex"
    assert (made.is_finished, made.error) == (True, "it is too complex")
    assert (sampler().is_finished, sampler().error) == (False, None)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5, "frequency_penalty": 1.0}])
def test_logits_that_come_with_a_gradient_are_taken(settings):
    logits = noise(100, 0)
    made = sampler(answer=[1, 1], seed=0, logprobs=1, **settings)
    assert made.choose(logits.clone().requires_grad_()) == made.choose(logits)


def test_an_empty_batch_has_no_tokens():
    assert choose_batch([], torch.empty(0, 10)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be from 0 to 1000"),
        ({"temperature": 1e39}, "temperature is 1e\\+39; it must be from 0 to 1000"),
        ({"temperature": float("nan")}, "temperature is nan; it must be from 0 to 1000"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be from 0 to 1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be from 0.001 to 1000"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; it must be from -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan; it must be from -2 to 2"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias of token 3 is 101.0; it must be from -100 to 100"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias has token 3 twice"),
        ({"seed": -1}, "seed is -1; it must be from 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"logprobs": -1}, "logprobs is -1; it must be 0 or more"),
        ({"json_schema": "{}", "regex": "a"}, "json_schema and regex are both given"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(UsageError, match=message) as caught:
        Sampling(**values)
    assert "\n" not in str(caught.value)


def test_a_biased_token_must_be_in_the_vocabulary():
    sampling = Sampling(logit_bias=((0, 1.0), (31, 1.0)))
    sampling.check_vocabulary(32)
    with pytest.raises(UsageError, match=r"logit_bias has token id 31, outside the model's vocabulary \(0 to 30\)"):
        sampling.check_vocabulary(31)
    with pytest.raises(UsageError, match="token id -1"):
        Sampling(logit_bias=((-1, 1.0),)).check_vocabulary(31)
