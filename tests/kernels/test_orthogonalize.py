from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from cadre.kernels.orthogonalize import orthogonalize, orthogonalize_reference

SIZE = st.integers(1, 70)


@given(st.integers(0, 9), SIZE, SIZE, st.integers(0, 6), st.integers(0, 99))
@example(8, 48, 192, 5, 0)
@example(8, 192, 128, 5, 0)
@example(8, 17, 1, 5, 0)
def test_equals_the_reference_in_float64(batch, rows, cols, steps, seed):
    g = torch.randn(batch, rows, cols, generator=torch.Generator().manual_seed(seed))
    want = orthogonalize_reference(g.double(), steps)
    assert_close(orthogonalize(g, steps).double(), want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", [(4, 12, 30), (4, 30, 12), (4, 20, 20)])
def test_singular_values_come_near_one(shape):
    made = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    values = torch.linalg.svdvals(made)
    # Random matrices' least values are small; five steps lift them as far as the quintic does.
    assert values.max() < 1.3 and values.median() > 0.6


def test_zeros_stay_zeros():
    assert not orthogonalize(torch.zeros(4, 5, 6)).any()


def test_reads_what_is_not_contiguous():
    g = torch.randn(6, 9, 4).mT
    assert_close(orthogonalize(g), orthogonalize_reference(g), atol=1e-5, rtol=1e-4)
