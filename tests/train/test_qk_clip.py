"""QK-Clip: peaks are the largest logits, and a clipped head's logits are at the bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.kernels.attention import causal_attention, largest_logits
from cadre.model.transformer import Transformer
from cadre.train.parallel.group import Parallel
from cadre.train.qk_clip import QKClip
from cadre.train.recipe import read_recipe
from tests.shapes import small

LATENT = {"deepseek_v3": {"q_lora_rank": 12}, "deepseek_v2": {"q_lora_rank": None}}


def lively(family: str, **changes) -> Transformer:
    model = Transformer(small(family, **changes)).initialize(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they begin as zeros
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
            elif "norm" not in name:
                parameter.mul_(20)
    return model.train()


def peaks(model: Transformer, clip: QKClip, ids: torch.Tensor) -> torch.Tensor:
    clip.reset()
    for part in ids.split(2):  # micro-batches
        model(part)
    return clip.peak_LH.clone()


def rows_of_values(model: Transformer) -> dict[str, torch.Tensor]:
    """What makes values and what takes them up, of no matter to logits."""
    found = {name: value for name, value in model.state_dict().items() if "v_proj" in name or "o_proj" in name}
    for name, value in model.state_dict().items():
        if "kv_b_proj" in name:
            heads = value.view(model.config.num_attention_heads, -1, value.shape[1])
            found[name] = heads[:, model.config.qk_nope_head_dim :]
    return found


@given(
    batch=st.integers(1, 3), length=st.integers(1, 200), groups=st.sampled_from([1, 2, 4]), width=st.integers(1, 40),
    documents=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_peaks_are_the_largest_logits_that_are_seen(batch, length, groups, width, documents, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, heads, width, generator=generator) for heads in (4, groups, groups))
    document = torch.randint(0, 3, (batch, length), generator=generator).sort(dim=1).values if documents else None
    peak = torch.full((4,), -1.0)
    causal_attention(q, k, v, 0.3, document, peak_H=peak)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cadre.kernels.attention._QUERIES", 64)
        expected = largest_logits(q, k, 0.3, document)
        patched.setattr("cadre.kernels.attention.attention_kernel_takes", lambda *_: False)
        without_kernel = torch.full((4,), -1.0)
        causal_attention(q, k, v, 0.3, document, peak_H=without_kernel)
        causal_attention(q[:0], k[:0], v[:0], 0.3, peak_H=without_kernel)
    torch.testing.assert_close(peak, expected.clamp(min=-1.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without_kernel, expected.clamp(min=-1.0), rtol=1e-5, atol=1e-5)
    score = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(4 // groups, dim=2)) * 0.3
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if document is not None:
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    torch.testing.assert_close(expected, score.masked_fill(~seen, float("-inf")).amax(dim=(0, 2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama", "llama with biases"])
def test_a_clipped_head_is_at_the_bound_and_others_are_as_they_were(family, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("cadre.kernels.attention.attention_kernel_takes", lambda *_: False)
    family, _, biases = family.partition(" ")
    model = lively(family, **LATENT.get(family, {}), num_hidden_layers=1, **({"attention_bias": True} if biases else {}))
    ids = torch.randint(0, 31, (4, 16), generator=torch.Generator().manual_seed(1))
    before = peaks(model, QKClip(model, 1e9), ids)
    bound = float(before.median())  # some heads above, some below
    clip = QKClip(model, bound)
    peaks(model, clip, ids)
    values = {name: value.clone() for name, value in rows_of_values(model).items()}
    assert clip.clip() == float(before.max()) > bound
    after = peaks(model, clip, ids)
    torch.testing.assert_close(after, before.clamp(max=bound), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, values[name]) for name, value in rows_of_values(model).items())
    again = {name: value.clone() for name, value in model.state_dict().items()}
    QKClip(model, 2 * bound).clip()  # nothing is above
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_evaluations_are_not_watched_and_normed_attention_is_left_alone():
    model = lively("deepseek_v3")
    clip = QKClip(model, 1.0)
    model.eval()
    model(torch.zeros(1, 5, dtype=torch.int64))
    assert bool((clip.peak_LH == float("-inf")).all())
    assert QKClip.of(lively("glm4_moe", use_qk_norm=True), 1.0, Parallel()) is None
    assert QKClip.of(model, None, Parallel()) is None
    assert len(QKClip(lively("glm4_moe", use_qk_norm=False), 1.0).attentions) > 0


def test_a_bound_below_zero_is_refused():
    with pytest.raises(UsageError, match="qk_clip"):
        read_recipe("pocket", ["optimizer.qk_clip=-1"])
