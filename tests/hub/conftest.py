"""Tiny models whose every tensor matters: no norm is 1, no bias 0, and routers choose with wide margins."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer

COMMON = dict(vocab_size=131, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
              max_position_embeddings=256, initializer_range=0.08)  # fmt: skip
LATENT = dict(kv_lora_rank=20, q_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16)
EXPERTS = dict(n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24,
               first_k_dense_replace=1, routed_scaling_factor=1.5)  # fmt: skip
SPARSE = dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
ALL_SPARSE = {**{k: v for k, v in COMMON.items() if k != "intermediate_size"}, **SPARSE}
KINDS = {
    "deepseek_v3": {**COMMON, **LATENT, **EXPERTS},
    "deepseek_v2": {**COMMON, **LATENT, **EXPERTS},
    "glm4_moe": {**COMMON, **EXPERTS, "num_key_value_heads": 2, "head_dim": 16},
    "qwen3_moe": {**COMMON, **SPARSE, "num_key_value_heads": 2, "head_dim": 16, "first_k_dense_replace": 1},
    "mixtral": {**ALL_SPARSE, "num_key_value_heads": 2},
    "olmoe": {**ALL_SPARSE, "num_key_value_heads": 2},
    "llama": {**COMMON, "num_key_value_heads": 2},
    "qwen2": {**COMMON, "num_key_value_heads": 2},
    "qwen3": {**COMMON, "num_key_value_heads": 2, "head_dim": 16},
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def _stir(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            tensor.copy_(0.2 * noise)
        elif "norm" in name:
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("gate.weight"):
            tensor.copy_(0.3 * noise)
        else:
            tensor.copy_(0.15 * noise)
    return model.eval()


@pytest.fixture(scope="session")
def stir():
    """stir(model, seed) fills every tensor of a Cadre or transformers model with noise of a telling size."""
    return _stir


@pytest.fixture(scope="session")
def config():
    """config(kind, **changes) -> ModelConfig of a tiny model."""
    return lambda kind="deepseek_v3", **changes: ModelConfig(model_type=kind, **{**KINDS[kind], **changes})


@pytest.fixture(scope="session")
def build(config):
    """build(kind, seed=0, **changes) -> a tiny Cadre model, stirred."""
    return lambda kind="deepseek_v3", seed=0, **changes: _stir(Transformer(config(kind, **changes)).initialize(seed), seed)
