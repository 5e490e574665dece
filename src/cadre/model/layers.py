"""The small parts every block shares. Weights may be wider than the activations (float32 masters under bfloat16
compute): each part casts its weight to the dtype of what flows through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadre.kernels.linear import linear
from cadre.kernels.native.library import kernels_take_rows
from cadre.kernels.norm import rms_norm
from cadre.kernels.routed import Dense, dense_swiglu


class Linear(nn.Linear):
    """`y = x W^T + b` in x's dtype; W is [out, in]. Left uninitialised: `initialize` or a checkpoint fills it.

    `narrow`, of this and other parts: whether products are of factors rounded to bfloat16 (`Transformer.round_factors`)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.narrow = False

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.narrow)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks wait for the module to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, its statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The dense feed-forward layer, and the shared experts as one: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        if weights is not None:
            return dense_swiglu(x, *weights, self.gate_proj.narrow)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def weights(self, x: Tensor) -> Dense | None:
        """gate, up and down, where `dense_swiglu` takes them with x and no part has to be called: parts of another kind
        (quantized, adapted) or watched by hooks have."""
        parts = self.gate_proj, self.up_proj, self.down_proj
        if not all(type(part) is Linear and not is_watched(part) for part in parts):
            return None
        gate, up, down = (part.weight for part in parts)
        return (gate, up, down) if kernels_take_rows(x, gate, up, down, narrow=self.gate_proj.narrow) else None
