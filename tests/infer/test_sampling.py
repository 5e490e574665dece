import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.infer.sampling import Sampling, sample

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def draw(logits, sampling, count=400, seed=0):
    """Ids drawn `count` times from the same logits."""
    rows = torch.tensor(logits).expand(count, -1)
    return sample(rows, sampling, torch.Generator().manual_seed(seed))


@given(logits=logit_lists, top_k=st.integers(1, 14))
def test_top_k_draws_only_from_the_k_likeliest(logits, top_k):
    least = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
    drawn = set(draw(logits, Sampling(1.0, top_k=top_k)).tolist())
    assert all(logits[token] >= least for token in drawn)
    assert len(drawn) <= top_k


@given(logits=logit_lists, top_p=st.floats(0.01, 1.0), temperature=st.floats(0.2, 3.0))
def test_top_p_draws_from_the_smallest_set_that_reaches_p(logits, top_p, temperature):
    p = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0)
    for token in set(draw(logits, Sampling(temperature, top_p=top_p)).tolist()):
        likelier = float(p[p > p[token]].sum())
        assert likelier < top_p + 1e-6


def test_top_p_keeps_the_token_that_crosses():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draw(logits, Sampling(1.0, top_p=0.6)).tolist()) == {0, 1}
    assert set(draw(logits, Sampling(1.0, top_p=0.45)).tolist()) == {0}
    assert set(draw(logits, Sampling(1.0, top_p=1.0), count=2000).tolist()) == {0, 1, 2, 3}


def test_top_p_counts_within_top_k():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draw(logits, Sampling(1.0, top_p=0.55, top_k=2)).tolist()) == {0}  # 0.4 of 0.7 is 0.57


@given(rows=st.lists(st.permutations(range(6)), min_size=1, max_size=5))
def test_temperature_zero_is_greedy_and_low_temperature_its_limit(rows):
    logits = torch.tensor(rows, dtype=torch.float32)
    best = logits.argmax(dim=-1)
    assert torch.equal(sample(logits, Sampling(0.0)), best)
    for temperature in (1e-3, 1e-30, 5e-324):
        assert torch.equal(sample(logits, Sampling(temperature), torch.Generator()), best)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(1.0, top_p=0.85)])
def test_frequencies_follow_the_distribution(sampling):
    """Chi-square at the 0.1% level, on a fixed seed."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    p = (logits / sampling.temperature).softmax(0)
    kept = 3 if sampling.top_k == 3 or sampling.top_p < 1 else 5
    p = torch.where(torch.arange(5) < kept, p, 0.0)
    p /= p.sum()
    count = 20000
    seen = torch.bincount(draw(logits.tolist(), sampling, count), minlength=5)
    assert int(seen[kept:].sum()) == 0
    chi_square = float(((seen - count * p)[:kept] ** 2 / (count * p[:kept])).sum())
    assert chi_square < {3: 13.82, 5: 18.47}[kept]


def test_a_seed_decides_the_draws():
    logits = torch.randn(50).tolist()
    assert torch.equal(draw(logits, Sampling(), seed=3), draw(logits, Sampling(), seed=3))
    assert not torch.equal(draw(logits, Sampling(), seed=3), draw(logits, Sampling(), seed=4))


def test_rows_have_their_own_distributions():
    logits = torch.full((3, 4), -50.0)
    logits[[0, 1, 2], [3, 0, 2]] = 50.0
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.9), Sampling(0.0)):
        assert sample(logits, sampling, torch.Generator()).tolist() == [3, 0, 2]


def test_bfloat16_logits_are_drawn_in_float32():
    logits = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16).expand(1000, -1)
    assert 400 < int(sample(logits, Sampling(1.0), torch.Generator().manual_seed(0)).sum()) < 600


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a finite number of at least 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**values)
