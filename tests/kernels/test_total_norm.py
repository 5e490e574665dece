"""The norm of many tensors together."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cadre.kernels.total_norm import total_norm


def random(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(0, 99))
@example([2**14 - 1, 2**14, 2**14 + 1, 3 * 2**14 + 70, 1], 0)
def test_equals_the_norm_of_all_elements(sizes, seed):
    tensors = [random(size, seed + number) for number, size in enumerate(sizes)]
    torch.testing.assert_close(total_norm(tensors).double(), torch.cat(tensors).double().norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_dtypes_and_strided_tensors_go_through_torch(dtype):
    wide = random(600, 0).view(20, 30)
    exact = wide.to(dtype)[:, ::2].double().norm()
    norm = total_norm([wide.to(dtype)[:, ::2]])
    torch.testing.assert_close(norm.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_is_the_same_with_any_number_of_threads():
    tensors, before = [random(100_003, 0), random(5, 1)], torch.get_num_threads()
    norms = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.append(float(total_norm(tensors)))
    finally:
        torch.set_num_threads(before)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_shows(value):
    assert not total_norm([torch.ones(9), torch.full((1,), value)]).isfinite()
