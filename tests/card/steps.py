"""Training steps on a card that is not there, of tensors that know only their shapes. A program of its own: what stands in for
the card must be loaded before torch.

    python -m tests.card.steps [LIBRARY]

Prints a JSON object, for each case what went wrong, or null: an operation that takes tensors of two devices, or one whose
result Python waits for.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

if __name__ == "__main__" and len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1])

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.train.balance import Balance
from cadre.train.objective import MicroBatch, losses
from cadre.train.optimizer import Optimizer
from cadre.train.qk_clip import QKClip
from cadre.train.recipe import BalanceSection, OptimizerSection
from tests.shapes import small

CARD = torch.device("cuda")
ALL_LOSSES = dict(sequence_weight=1e-4, batch_weight=1e-4, global_weight=1e-4, z_weight=1e-4)


def step(
    config: ModelConfig, dtype: torch.dtype = torch.bfloat16, optimizer: str = "adamw", documents: bool = False,
    balance: dict[str, float] = ALL_LOSSES, qk_clip: bool = False,
) -> None:  # fmt: skip
    """Two optimizer steps; clipping is left out, whose norm the trainer means to wait for."""
    with FakeTensorMode(), CARD:
        model = Transformer(config).train()
        model.compute_in(dtype)
        section = OptimizerSection(name=optimizer, lr=1e-3)
        made, even = Optimizer(model, section, narrow=dtype == torch.bfloat16), Balance(model, BalanceSection(**balance))
        clip = QKClip(model, 20.0) if qk_clip else None
        ids_BT = torch.randint(config.vocab_size, (2, 33 + len(model.mtp)))
        for _ in range(2):
            made.zero_grad()
            even.reset()
            if clip is not None:
                clip.reset()
            document_BT = torch.zeros_like(ids_BT) if documents else None
            losses(model, MicroBatch(ids_BT, document_BT), even, mtp_weight=0.3).total.backward()
            grads = [parameter.grad for parameter in model.parameters()]
            assert all(grad is not None and grad.device.type == "cuda" for grad in grads)
            even.update()
            made.step(1.0)


WIDE = dict(hidden_size=32, moe_intermediate_size=16, intermediate_size=32)  # as grouped_mm wants them
V3 = small("deepseek_v3", **WIDE, num_nextn_predict_layers=1, n_routed_experts=8, n_group=4, topk_group=2)
V2 = small("deepseek_v2", **WIDE)
CASES = {
    "deepseek_v3": dict(config=V3),
    "deepseek_v3 by Muon": dict(config=V3, optimizer="muon"),
    "deepseek_v3, logits watched": dict(config=V3, qk_clip=True),
    "deepseek_v3, documents": dict(config=V3, documents=True),
    "deepseek_v2": dict(config=V2),
    "glm4_moe": dict(config=small("glm4_moe", **WIDE)),
    "qwen3_moe": dict(config=small("qwen3_moe", **WIDE)),
    "olmoe": dict(config=small("olmoe", hidden_size=32, moe_intermediate_size=16)),
    "llama": dict(config=small("llama", hidden_size=32)),
    "llama in float32": dict(config=small("llama", hidden_size=32), dtype=torch.float32),
}


def wrong(case: dict) -> str | None:
    try:
        step(**case)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return f"waits for the result of {error.func}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    print(json.dumps({name: wrong(case) for name, case in CASES.items()}), flush=True)
    # Not by `exit`: torch's threads for a card that is not there may abort ("terminate called") while it takes them down.
    os._exit(0)
