from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cadre.errors import UsageError
from cadre.kernels.native.library import own_products_faster
from cadre.model.config import ModelConfig
from cadre.model.layers import RMSNorm
from cadre.model.transformer import Transformer
from tests.shapes import FAMILIES, configs, small

KINDS = [
    small("deepseek_v3", num_nextn_predict_layers=2),
    small("deepseek_v2", num_nextn_predict_layers=1),
    small("glm4_moe", num_nextn_predict_layers=1),
    *(small(family) for family in FAMILIES[3:]),
]


def built(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with weights large enough for its outputs to depend on its inputs visibly."""
    return Transformer(config.model_copy(update={"initializer_range": 0.3})).initialize(seed)


def ids_for(config: ModelConfig, length: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def every_stage(model: Transformer, ids: Tensor, document: Tensor | None = None) -> list[Tensor]:
    """Hidden states of the main model and of each prediction module, all as long as the shortest."""
    length = ids.shape[1] - len(model.mtp)
    stages = [model.hidden(ids[:, :length], document_BT=None if document is None else document[:, :length])]
    for depth in range(len(model.mtp)):
        shifted = ids[:, depth + 1 : depth + 1 + length]
        documents = None if document is None else document[:, :length]
        stages.append(model.mtp_hidden(stages[-1], shifted, depth, document_BT=documents))
    return stages


@pytest.mark.parametrize("config", KINDS, ids=FAMILIES)
def test_no_output_sees_later_tokens(config):
    """Position t of the main model sees ids up to t, of module d ids up to t + d + 1."""
    model, ids = built(config), ids_for(config, 12)
    before = every_stage(model, ids)
    for position in (3, 7, 10):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % config.vocab_size
        for stage, (was, now) in enumerate(zip(before, every_stage(model, changed), strict=True)):
            first = position - stage
            assert_close(now[:, :first], was[:, :first], rtol=0, atol=1e-5)
            if first < was.shape[1]:
                assert (now[:, first] - was[:, first]).abs().max() > 1e-3


@given(configs(), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_packed_documents_are_as_if_alone(config: ModelConfig, lengths, seed):
    model, ids = Transformer(config).initialize(seed), ids_for(config, sum(lengths), batch=1, seed=seed)
    document = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])[None]
    packed = model.hidden(ids, document_BT=document)
    alone = [model.hidden(part) for part in ids.split(lengths, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1), atol=1e-3, rtol=1e-3)


@given(configs(), st.integers(1, 6))
def test_logits_have_the_vocabulary_s_width(config: ModelConfig, length):
    model = Transformer(config).initialize(0)
    ids = ids_for(config, length)
    logits = model(ids)
    assert logits.shape == (2, length, config.vocab_size)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    hidden = model.hidden(ids)
    for depth in range(config.num_nextn_predict_layers):
        hidden = model.mtp_hidden(hidden, ids, depth)
        assert hidden.shape == (2, length, config.hidden_size)
    assert len(model.mtp) == config.num_nextn_predict_layers


def test_rows_of_a_batch_are_independent():
    config = small("deepseek_v3")
    model, ids = built(config), ids_for(config, 8, batch=3)
    assert_close(model(ids)[1:2], model(ids[1:2]), atol=1e-5, rtol=1e-4)


def test_prediction_module_is_the_report_s_equation():
    """h' = block(M [norm(embedding of the next token); norm(h)]) (V3 report, equations 21 and 22)."""
    config = small("deepseek_v3", num_nextn_predict_layers=1)
    model, ids = built(config), ids_for(config, 7)
    module, hidden = model.mtp[0], model.hidden(ids)
    with torch.no_grad():
        module.enorm.weight.uniform_(0.5, 2)
        module.hnorm.weight.uniform_(0.5, 2)
        module.norm.weight.uniform_(0.5, 2)
    joined = torch.cat((module.enorm(model.embed_tokens.weight[ids]), module.hnorm(hidden)), dim=-1)
    turn = model.rotary(7, ids.device)
    want = module.norm(module.block(joined @ module.eh_proj.weight.T, turn, None, None))
    assert_close(model.mtp_hidden(hidden, ids, 0), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_head_is_the_embedding(family):
    model = Transformer(small(family, tie_word_embeddings=True)).initialize(0)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert len([n for n, _ in model.named_parameters() if n in ("embed_tokens.weight", "lm_head.weight")]) == 1
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.2)
    untied = Transformer(small(family)).initialize(0)
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_tied_weight_gets_the_gradients_of_both_its_uses():
    config = small("llama", tie_word_embeddings=True)
    tied, untied = Transformer(config).initialize(0), Transformer(small("llama"))
    untied.load_state_dict(tied.state_dict())
    ids = ids_for(config, 6)
    for model in (tied, untied):
        model(ids).logsumexp(-1).sum().backward()
    both = untied.lm_head.weight.grad + untied.embed_tokens.weight.grad
    assert_close(tied.lm_head.weight.grad, both)


@given(configs(), st.integers(0, 2**31))
def test_initialize_is_a_function_of_the_seed(config: ModelConfig, seed):
    torch.manual_seed(1)
    first = Transformer(config).initialize(seed).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    second = Transformer(config).initialize(seed).state_dict()
    other = Transformer(config).initialize(seed + 1).state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_initialize_fills_everything_and_clears_what_was():
    model = Transformer(small("deepseek_v3", num_nextn_predict_layers=1, attention_bias=True, initializer_range=0.006))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    model.initialize(3)
    norms = {id(p) for module in model.modules() if isinstance(module, RMSNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            assert torch.all(parameter == 1), name
        elif name.endswith("bias"):
            assert torch.all(parameter == 0), name
        else:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.5), name
    for _, mixture in model.sparse_layers():
        assert torch.all(mixture.gate.e_score_correction_bias == 0)


@pytest.mark.parametrize("config", KINDS, ids=FAMILIES)
def test_float32_masters_under_bfloat16_compute(config):
    model, ids = Transformer(config).initialize(0), ids_for(config, 9)
    exact = model(ids).detach()
    model.compute_dtype = torch.bfloat16
    stages = every_stage(model, ids)
    assert {stage.dtype for stage in stages} == {torch.bfloat16}
    logits = model(ids)
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)
    sum(model.lm_head(stage).float().logsumexp(-1).sum() for stage in stages).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


def test_master_weights_and_a_cast_model_compute_alike():
    config = small("deepseek_v3")
    model, ids = Transformer(config).initialize(0), ids_for(config, 9)
    cast = Transformer(config)
    cast.load_state_dict(model.state_dict())
    cast.bfloat16()
    model.compute_dtype = torch.bfloat16
    # The router alone differs: it reads its weight in float32, here exact and there rounded.
    with torch.no_grad():
        for _, mixture in model.sparse_layers():
            mixture.gate.weight.copy_(mixture.gate.weight.bfloat16())
    assert_close(model(ids), cast(ids), rtol=0, atol=0)


@given(configs())
def test_sparse_layers_are_those_the_config_says(config: ModelConfig):
    with torch.device("meta"):
        model = Transformer(config)
    want = [layer for layer in range(config.total_layers) if config.is_sparse(layer)]
    assert [layer for layer, _ in model.sparse_layers()] == want
    assert config.has_experts == bool(want)


@pytest.mark.skipif(not own_products_faster(narrow=True), reason="the processor has no products of bfloat16")
@pytest.mark.parametrize("config", KINDS, ids=FAMILIES)
def test_on_a_cpu_with_products_of_bfloat16_only_factors_are_rounded(config):
    def run(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        model = Transformer(config).initialize(0)
        model.compute_in(dtype)
        logits = model(ids_for(config, 40))
        logits.float().logsumexp(-1).sum().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (exact, exact_grads), (rounded, grads) = run(torch.float32), run(torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        if ".gate." not in name:  # a choice that rounding changes moves the router's by much
            assert (grad - exact_grads[name]).norm() < 0.1 * exact_grads[name].norm() + 1e-6, name


def test_elsewhere_all_that_flows_is_bfloat16(monkeypatch):
    monkeypatch.setattr("cadre.model.transformer.own_products_faster", lambda narrow: False)
    model = Transformer(small("deepseek_v3")).initialize(0)
    model.compute_in(torch.bfloat16)
    assert model(ids_for(model.config, 9)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 5)])
def test_ids_of_another_shape_are_refused_by_it(shape):
    with pytest.raises(UsageError, match=rf"^the ids have shape {re.escape(str(list(shape)))}; it must be \[batch, seq\]"):
        built(KINDS[-1])(torch.zeros(shape, dtype=torch.int64))
