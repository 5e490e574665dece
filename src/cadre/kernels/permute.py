"""Moving tokens to routed rows and back. Autograd would scatter with atomics; both directions are gathers, because each
row knows its token and each token its rows. `embedding_bag` adds the rows of a token without holding copies of them.

Letters in names: T token, K choices of a token, R = T*K routed rows, D hidden, E expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.card import launches
from cadre.kernels.native.library import is_plain, library


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
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, weight_TK, row_TK, token_R = ctx.saved_tensors
        if y_RD.is_contiguous() and weight_TK.is_contiguous() and launches(y_RD, weight_TK, row_TK, grad_TD):
            from cadre.kernels.permute_triton import sum_choices_gradient_on_card

            grad_RD, grad_TK = sum_choices_gradient_on_card(grad_TD.contiguous(), y_RD, weight_TK, row_TK.contiguous())
            return grad_RD, grad_TK.to(weight_TK.dtype), None, None
        weight_R = torch.empty_like(weight_TK).flatten()
        weight_R[row_TK.flatten()] = weight_TK.flatten()
        grad_RD = grad_TD.index_select(0, token_R)
        grad_R = torch.linalg.vecdot(y_RD, grad_RD)
        return grad_RD.mul_(weight_R.to(grad_TD.dtype)[:, None]), grad_R[row_TK].to(weight_TK.dtype), None, None


def sort_choices_reference(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens' choices (int64, from 0 to experts - 1) lie when sorted by expert, tokens in order within each: row_TK, the
    row of each choice; token_R, the token of each row; load_E, rows per expert. All int64."""
    order_R = expert_TK.flatten().argsort(stable=True)
    return _places(order_R, expert_TK), order_R // expert_TK.shape[1], count_choices(expert_TK, experts)


def sort_choices_by_digits(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, for a card, which sorts eight bits at a time, of as many as there are. What is sorted says how many of
    each there were, where counting would have every choice wait for the few numbers that all add to."""
    narrow = torch.uint8 if experts <= 256 else torch.int16
    key_R, order_R = expert_TK.flatten().to(narrow).sort(stable=True)
    stop_E = torch.searchsorted(key_R, torch.arange(experts, device=key_R.device, dtype=narrow), right=True)
    load_E = stop_E.diff(prepend=stop_E.new_zeros(1))
    return _places(order_R, expert_TK), order_R // expert_TK.shape[1], load_E


def _places(order_R: Tensor, expert_TK: Tensor) -> Tensor:
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return row_R.view(expert_TK.shape)


def count_choices(expert_TK: Tensor, experts: int) -> Tensor:
    """How many choices fell on each expert, int64 [E]. `bincount` would make an accelerator's program wait for its result."""
    flat_R = expert_TK.flatten()
    return flat_R.new_zeros(experts).scatter_add_(0, flat_R, torch.ones_like(flat_R))


def sort_choices(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; on a CPU by counting, in C++, on a card by digits."""
    if expert_TK.is_cuda and experts < 2**15:
        return sort_choices_by_digits(expert_TK, experts)
    native = library() if is_plain(expert_TK, dtype=torch.int64) else None
    if native is None:
        return sort_choices_reference(expert_TK, experts)
    if expert_TK.numel() and not 0 <= int(expert_TK.min()) <= int(expert_TK.max()) < experts:
        raise ValueError(f"a choice is not one of the {experts} experts")
    choice_TK = expert_TK.contiguous()
    row_TK, token_R = torch.empty_like(choice_TK), choice_TK.new_empty(choice_TK.numel())
    load_E = choice_TK.new_empty(experts)
    native.cadre_sort_choices(
        choice_TK.data_ptr(), *choice_TK.shape, experts, row_TK.data_ptr(), token_R.data_ptr(), load_E.data_ptr()
    )
    return row_TK, token_R, load_E


def gather_rows(x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
    """x_TD[token_R]: the token of each routed row, [R, D]. row_TK is the inverse of token_R and serves the gradient."""
    return _GatherRows.apply(x_TD, token_R, row_TK)


def gather_rows_reference(x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
    """`gather_rows` with autograd's own gradient."""
    return x_TD[token_R]


def sum_choices(y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor) -> Tensor:
    """sum_k weight_TK[t, k] * y_RD[row_TK[t, k]]: [T, D] in y's dtype; weights are float32. The gradient by Triton on cards."""
    return _SumChoices.apply(y_RD, weight_TK, row_TK, token_R)


def sum_choices_reference(y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor) -> Tensor:
    """`sum_choices` with autograd's own gradient."""
    return (y_RD[row_TK] * weight_TK.to(y_RD.dtype)[..., None]).sum(dim=1)
