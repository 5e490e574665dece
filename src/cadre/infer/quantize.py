"""Weights in 8 or 4 bits for inference: less memory and fewer bytes read a token. The router, the norms and the embedding
keep their precision; everything that multiplies, the head included, is rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadre.errors import UsageError
from cadre.hub.load import load
from cadre.kernels.grouped import expert_swiglu
from cadre.kernels.linear import linear, narrowed
from cadre.kernels.native.library import own_products_faster, training_kernels_take
from cadre.kernels.quantized import QuantizedMatrix, dequantize, quantize
from cadre.kernels.routed import Dense, routed_swiglu_quantized
from cadre.model.experts import Experts, Plan
from cadre.model.layers import Linear
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BITS = {"int8": 8, "int4": 4}


class _Kept(nn.Module):
    """A quantized matrix as buffers of a module, so that it moves with the model."""

    data: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        made = quantize(weight.detach().flatten(0, -2), bits)
        self.bits, self.rows, self.cols, self.shape = bits, made.rows, made.cols, weight.shape
        self.register_buffer("data", made.data)
        self.register_buffer("scale", made.scale)

    def matrix(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.bits, self.rows, self.cols, self.data, self.scale)

    def wide(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.matrix(), dtype).view(self.shape)


class QuantizedLinear(nn.Module):
    """As `Linear`, its weight widened for each use."""

    def __init__(self, linear: Linear, bits: int) -> None:
        super().__init__()
        self.kept = _Kept(linear.weight, bits)
        self.bias, self.narrow = linear.bias, linear.narrow

    @property
    def weight(self) -> Tensor:
        return self.kept.wide(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.narrow:
            return linear(x, narrowed(self.kept.matrix()), self.bias, narrow=True)
        return F.linear(x, self.kept.wide(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class QuantizedExperts(nn.Module):
    """As `Experts`, both stacks widened for each use, an expert at a time where `moves_rows`."""

    def __init__(self, experts: Experts, bits: int) -> None:
        super().__init__()
        self.gate_up = _Kept(experts.gate_up_proj, bits)
        self.down = _Kept(experts.down_proj, bits)
        self.narrow = experts.narrow

    def moves_rows(self, x_TD: Tensor) -> bool:
        return self.narrow and not torch.is_grad_enabled() and training_kernels_take(x_TD) and own_products_faster(narrow=True)

    def forward(self, x: Tensor, load_E: Tensor, plan: Plan | None = None, shared: Dense | None = None) -> Tensor:
        if plan is None:
            return expert_swiglu(x, load_E, self.gate_up.wide(x.dtype), self.down.wide(x.dtype))
        assert shared is None  # they are quantized as well
        matrices = self.gate_up.matrix(), self.down.matrix()
        return routed_swiglu_quantized(x, plan.weight_TK, plan.row_TK, plan.token_R, load_E, *matrices)


def load_quantized(
    path: str | Path, kind: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Transformer, Tokenizer | None]:
    """As `cadre.load`, for inference only and with weights in 8 or 4 bits: each module is rounded once it is read, so that a
    model is never in memory as it is stored. kind: "int8" or "int4". Raises `UsageError` for another, and as `cadre.load`."""
    model, tokenizer = load(path, dtype=dtype, device=device, each=_rounding(kind))
    return _for_inference(model), tokenizer


def _rounding(kind: str) -> Callable[[nn.Module], nn.Module]:
    """What makes of a module that multiplies the same in 8 or 4 bits, and leaves any other."""
    if kind not in BITS:
        raise UsageError(f"quantization is {kind!r}; it must be one of {', '.join(BITS)}")

    def rounded(module: nn.Module) -> nn.Module:
        if isinstance(module, Linear):
            return QuantizedLinear(module, BITS[kind])
        return QuantizedExperts(module, BITS[kind]) if isinstance(module, Experts) else module

    return rounded


def _for_inference(model: Transformer) -> Transformer:
    """A model with rounded modules, such that what widens their weights again computes in the dtype that the model had."""
    model.compute_dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    return model.requires_grad_(False)


def quantize_model(model: Transformer, kind: str) -> Transformer:
    """Round a model's weights in place, for inference only. A tied head is rounded, the embedding it came from is not. Raises
    `UsageError` for an unknown kind or a model already rounded."""
    rounded = _rounding(kind)
    if any(isinstance(module, _Kept) for module in model.modules()):
        raise UsageError("the model's weights are quantized already")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, rounded(child))
    return _for_inference(model)


def weight_of(module: nn.Module) -> Tensor | QuantizedMatrix:
    """What a linear layer multiplies by, as the C++ kernels take it."""
    return module.kept.matrix() if isinstance(module, QuantizedLinear) else cast(Tensor, module.weight)


def weights_of(experts: nn.Module) -> tuple[Tensor | QuantizedMatrix, Tensor | QuantizedMatrix]:
    """The two stacks of an expert layer: gate and up as one, and down."""
    if isinstance(experts, QuantizedExperts):
        return experts.gate_up.matrix(), experts.down.matrix()
    return cast(Tensor, experts.gate_up_proj), cast(Tensor, experts.down_proj)
