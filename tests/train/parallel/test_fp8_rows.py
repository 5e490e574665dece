"""Rows in 8 bits: how far what comes back may be from what left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.train.parallel.fp8_rows import dequantize, quantize


@given(st.integers(0, 3), st.integers(1, 300), st.integers(0, 2**32), st.floats(-100, 100), st.floats(0, 30))
def test_what_comes_back_is_near(rows, width, seed, exponent, spread):
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(exponent + spread * (torch.rand(rows, width, generator=generator) - 0.5))
    left = torch.randn(rows, width, generator=generator) * size
    packed = quantize(left)
    assert packed.shape == (rows, width + -(-width // 128)) and packed.dtype == torch.uint8
    back = dequantize(packed, width, torch.float32)
    for run, others in zip(left.split(128, dim=1), back.split(128, dim=1), strict=True):
        bound = torch.maximum(run.abs() / 16, run.abs().amax(dim=1, keepdim=True) * 2**-17)
        assert ((run - others).abs() <= bound).all()


@given(st.lists(st.integers(-448, 448), min_size=1, max_size=140))
def test_what_8_bits_can_say_comes_back_exactly(numbers):
    exact = torch.tensor([numbers], dtype=torch.float32).to(torch.float8_e4m3fn).float()
    assert torch.equal(dequantize(quantize(exact), len(numbers), torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_128_takes_129_bytes_and_comes_back_in_its_dtype(dtype):
    rows = torch.linspace(-3, 3, 256, dtype=dtype).view(2, 128)
    assert quantize(rows).shape == (2, 129)
    assert dequantize(quantize(rows), 128, dtype).dtype == dtype


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_does_not_come_back_finite(bad):
    rows = torch.ones(2, 256)
    rows[0, 130] = bad
    back = dequantize(quantize(rows), 256, torch.float32)
    assert not back[0, 128:].isfinite().any()
    assert (back[0, :128] == 1).all() and (back[1] == 1).all()
