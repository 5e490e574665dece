"""Eight and four bits a weight: what comes back is the nearest value that the bits can say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.kernels.linear import narrowed
from cadre.kernels.quantized import GROUP, dequantize, levels, quantize


def test_the_sixteen_levels_are_the_published_ones() -> None:
    # QLoRA (arXiv 2305.14314), appendix E.
    published = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
                 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]  # fmt: skip
    assert levels().tolist() == pytest.approx(published, abs=1e-4)


def test_the_levels_are_made_once() -> None:
    with torch.inference_mode():
        assert levels() is levels()
    assert not levels().is_inference()


@given(rows=st.integers(1, 9), cols=st.integers(1, 80), seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_eight_bits_are_off_by_half_a_step(rows: int, cols: int, seed: int, scale: float) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale
    made = quantize(weight, 8)
    assert made.data.shape == (rows, cols) and made.data.dtype == torch.int8
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((dequantize(made, torch.float32) - weight).abs() <= 0.5001 * step).all()


@given(rows=st.integers(1, 9), cols=st.integers(1, 80), seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_four_bits_take_the_nearest_level_of_their_group(rows: int, cols: int, seed: int, scale: float) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale
    made = quantize(weight, 4)
    groups = -(-cols // GROUP)
    assert made.data.shape == (rows, groups * GROUP // 2) and made.scale.shape == (rows, groups)
    back = dequantize(made, torch.float32)
    of_column = made.scale.float().repeat_interleave(GROUP, dim=1)[:, :cols]
    nearest = ((weight[:, :, None] - of_column[:, :, None] * levels()).abs()).amin(dim=2)
    assert torch.allclose((back - weight).abs(), nearest, atol=1e-6 * scale)


@given(rows=st.integers(1, 40), cols=st.integers(1, 80), bits=st.sampled_from([8, 4]), seed=st.integers(0, 1000))
def test_the_kernel_narrows_to_the_same_bits(rows: int, cols: int, bits: int, seed: int) -> None:
    made = quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)), bits)
    assert torch.equal(narrowed(made), dequantize(made, torch.bfloat16))


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zero(bits: int) -> None:
    assert not dequantize(quantize(torch.zeros(3, 40), bits), torch.float32).any()


@pytest.mark.parametrize(("bits", "most"), [(8, 8.1), (4, 4.5)])
def test_bytes_are_what_the_bits_say(bits: int, most: float) -> None:
    made = quantize(torch.randn(64, 1024), bits)
    assert (made.data.nbytes + made.scale.nbytes) * 8 / (64 * 1024) <= most
