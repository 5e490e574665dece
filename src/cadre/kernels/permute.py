"""Moving tokens to routed rows and back. Autograd would scatter with atomics; both directions are gathers, because each
row knows its token and each token its rows. `embedding_bag` adds the rows of a token without holding copies of them.

Letters in names: T token, K choices of a token, R = T*K routed rows, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return F.embedding_bag(row_TK, grad_RD, mode="sum"), None, None


class _SumChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weight_TK, row_TK, token_R)
        return F.embedding_bag(row_TK, y_RD, mode="sum", per_sample_weights=weight_TK.to(y_RD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, weight_TK, row_TK, token_R = ctx.saved_tensors
        weight_R = torch.empty_like(weight_TK).flatten()
        weight_R[row_TK.flatten()] = weight_TK.flatten()
        grad_RD = grad_TD.index_select(0, token_R)
        grad_R = torch.linalg.vecdot(y_RD, grad_RD)
        return grad_RD.mul_(weight_R.to(grad_TD.dtype)[:, None]), grad_R[row_TK].to(weight_TK.dtype), None, None


def gather_rows(x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
    """x_TD[token_R]: the token of each routed row, [R, D]. row_TK is the inverse of token_R and serves the gradient."""
    return _GatherRows.apply(x_TD, token_R, row_TK)


def gather_rows_reference(x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
    """`gather_rows` with autograd's own gradient."""
    return x_TD[token_R]


def sum_choices(y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor) -> Tensor:
    """sum_k weight_TK[t, k] * y_RD[row_TK[t, k]]: [T, D] in y's dtype; weights are float32."""
    return _SumChoices.apply(y_RD, weight_TK, row_TK, token_R)


def sum_choices_reference(y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor) -> Tensor:
    """`sum_choices` with autograd's own gradient."""
    return (y_RD[row_TK] * weight_TK.to(y_RD.dtype)[..., None]).sum(dim=1)
