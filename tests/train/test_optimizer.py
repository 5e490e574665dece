import pytest
import torch
from hypothesis import given

from cadre.model.transformer import Transformer
from cadre.plan.memory import state_bytes
from cadre.plan.shape import Shape
from cadre.train.optimizer import Optimizer
from cadre.train.recipe import OptimizerSection
from tests.shapes import configs, small


def build(name: str, seed: int = 0, tied: bool = False, **section) -> tuple[Transformer, Optimizer]:
    config = small("deepseek_v3", num_nextn_predict_layers=1, tie_word_embeddings=tied, attention_bias=True)
    model = Transformer(config).initialize(seed)
    return model, Optimizer(model, OptimizerSection(name=name, **{"lr": 0.01, **section}))


def step(model: Transformer, optimizer: Optimizer, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(factor)


def parameters(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16", "muon"])
def test_state_comes_back_bit_for_bit(name):
    model, optimizer = build(name)
    for seed in range(3):
        step(model, optimizer, seed)
    kept = {key: value.clone() for key, value in optimizer.tensors().items()}
    again, other = build(name, seed=1)
    again.load_state_dict(model.state_dict())
    other.load_tensors(kept)
    assert other.tensors().keys() == kept.keys()
    for seed in (3, 4):
        step(model, optimizer, seed, 0.5)
        step(again, other, seed, 0.5)
    for key, value in optimizer.tensors().items():
        assert torch.equal(other.tensors()[key], value) and other.tensors()[key].dtype == value.dtype, key
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_adamw_is_torchs_to_the_last_bit():
    model, optimizer = build("adamw")
    twin = Transformer(model.config).initialize(0)
    of = dict(twin.named_parameters())
    groups = [{**g, "params": [of[optimizer.names[p]] for p in g["params"]]} for g in optimizer.parts[0].param_groups]
    theirs = torch.optim.AdamW(groups, fused=True)
    for seed in range(3):
        step(model, optimizer, seed)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            of[name].grad = parameter.grad.clone()
        theirs.step()
    assert all(torch.equal(parameter, of[name]) for name, parameter in model.named_parameters())


def test_state_is_named_after_parameters():
    model, optimizer = build("muon")
    assert optimizer.tensors() == {}
    step(model, optimizer, 0)
    tensors = optimizer.tensors()
    assert tensors["layers.1.mlp.experts.down_proj.momentum"].shape == model.layers[1].mlp.experts.down_proj.shape
    assert {f"embed_tokens.weight.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= tensors.keys()
    with pytest.raises(KeyError, match=r"layers\.9\.weight"):
        optimizer.load_tensors({"layers.9.weight.exp_avg": torch.zeros(1)})


def test_every_parameter_is_stepped_once_by_one_part():
    for name in ("adamw", "adamw-bf16", "muon"):
        model, optimizer = build(name)
        owned = [p for part in optimizer.parts for group in part.param_groups for p in group["params"]]
        assert len(owned) == len(set(owned)) == len(list(model.parameters()))
        assert set(owned) == set(model.parameters())


def test_muon_takes_the_matrices_inside_blocks_and_no_others():
    _, optimizer = build("muon")
    adamw, muon = ({optimizer.names[p] for g in part.param_groups for p in g["params"]} for part in optimizer.parts)
    assert {"embed_tokens.weight", "lm_head.weight", "layers.1.mlp.gate.weight", "norm.weight"} <= adamw
    assert {"layers.1.mlp.experts.gate_up_proj", "layers.0.self_attn.o_proj.weight", "mtp.0.eh_proj.weight"} <= muon
    assert not any("norm" in name or name.endswith(("bias", "gate.weight")) for name in muon)


def test_of_experts_gate_and_up_are_matrices_of_their_own_and_fewer_iterations_do():
    _, optimizer = build("muon")
    groups = optimizer.parts[1].param_groups
    settings = {optimizer.names[p]: (g["fused"], g["iterations"]) for g in groups for p in g["params"]}
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.o_proj.weight")
    assert [settings[f"layers.1.{name}"] for name in names] == [(2, 3), (1, 3), (1, 5)]


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16", "muon"])
def test_norms_and_biases_do_not_decay_and_matrices_do(name):
    model, optimizer = build(name, weight_decay=0.5, lr=0.1, router_lr_scale=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for parameter_name, parameter in model.named_parameters():
        lr = 0.05 * (0.5 if parameter_name.endswith("mlp.gate.weight") else 1)
        expected = 2.0 if parameter.ndim < 2 else 2.0 * (1 - lr * 0.5)
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), msg=parameter_name)


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_adamw_is_the_published_update(tied, name):
    """One step from zero moments is lr * sign(gradient), whatever the gradient's size: a tied matrix moves once too."""
    model, optimizer = build(name, tied=tied, weight_decay=0.0, lr=0.01)
    before = parameters(model)
    assert ("lm_head.weight" in before) is not tied
    step(model, optimizer, 0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.01 * parameter.grad.sign(), rtol=0, atol=1e-5)
    assert (model.lm_head.weight is model.embed_tokens.weight) is tied


def test_the_factor_scales_every_groups_own_rate():
    model, optimizer = build("muon", lr=0.02, adamw_lr=0.004, router_lr_scale=0.5)
    step(model, optimizer, 0, factor=0.25)

    def rates() -> dict[str, float]:
        return {optimizer.names[p]: g["lr"] for part in optimizer.parts for g in part.param_groups for p in g["params"]}

    names = ("embed_tokens.weight", "layers.1.mlp.gate.weight", "layers.1.mlp.experts.down_proj", "norm.weight")
    assert [rates()[name] for name in names] == pytest.approx([0.001, 0.0005, 0.005, 0.001])
    step(model, optimizer, 1, factor=1.0)
    assert [rates()[name] for name in names] == pytest.approx([0.004, 0.002, 0.02, 0.004])


def test_moments_of_bfloat16_go_where_those_of_float32_go():
    sides = [build(name) for name in ("adamw", "adamw-bf16")]
    start = parameters(sides[0][0])
    for seed in range(20):
        for side in sides:
            step(*side, seed)
    (wide, of_wide), (narrow, of_narrow) = sides
    assert {t.dtype for key, t in of_narrow.tensors().items() if not key.endswith(".step")} == {torch.bfloat16}
    assert of_narrow.tensors().keys() == of_wide.tensors().keys()
    for name, parameter in narrow.named_parameters():
        exact = dict(wide.named_parameters())[name].detach()
        assert 0 < (parameter.detach() - exact).norm() < 0.01 * (exact - start[name]).norm(), name


def test_the_rate_that_is_logged_is_the_one_that_is_taken():
    assert build("muon", lr=0.02, adamw_lr=0.004)[1].lr == 0.02
    assert build("adamw", lr=0.02, adamw_lr=0.004)[1].lr == 0.004


@pytest.mark.parametrize(
    "name, other", [("adamw", "adamw-bf16"), ("adamw-bf16", "adamw"), ("muon", "adamw"), ("adamw", "muon")]
)
def test_the_state_of_another_optimizer_is_refused(name, other):
    model, optimizer = build(name)
    step(model, optimizer, 0)
    with pytest.raises(KeyError):
        build(other)[1].load_tensors(optimizer.tensors())


def test_zero_grad_forgets_gradients():
    model, optimizer = build("muon")
    step(model, optimizer, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16", "muon"])
@given(config=configs())
def test_the_planner_counts_weights_gradients_and_states(name, config):
    model = Transformer(config).initialize(0)
    optimizer = Optimizer(model, OptimizerSection(name=name, lr=0.01))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *(t for t in optimizer.tensors().values() if t.ndim)]
    buffers = sum(mixture.gate.e_score_correction_bias is not None for _, mixture in model.sparse_layers())
    each = 12 if name == "adamw-bf16" else 16  # bytes with which the planner counts a router's bias as well
    counted = state_bytes(Shape.from_config(config), name) - each * (config.n_routed_experts or 0) * buffers
    assert counted == sum(tensor.nbytes for tensor in held)
