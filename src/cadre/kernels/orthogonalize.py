"""The nearest semi-orthogonal matrix, roughly, of each of a batch: what Muon makes of an update; and its whole step.

Letters in names: B matrix, M row, N column.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cadre.kernels.linear import rounded
from cadre.kernels.native import structs
from cadre.kernels.native.library import kernels, own_products_faster, training_kernels_take

# K. Jordan's quintic (2024): it pushes singular values to within about 0.7 to 1.2, which is near enough, in few steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize_reference(g_BMN: Tensor, steps: int = 5, narrow: bool = False) -> Tensor:
    """Newton-Schulz iterations X <- a X + (b G + c G G) X with G = X X^T, from X of Frobenius norm 1: [B, M, N] in and out.
    `narrow`: factors of products are rounded to bfloat16; on an accelerator all that lies between is bfloat16 too."""
    a, b, c = _COEFFICIENTS
    x = g_BMN.mT if g_BMN.shape[1] > g_BMN.shape[2] else g_BMN
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    on_cpu = x.device.type == "cpu"
    if narrow and not on_cpu:
        x = x.bfloat16()

    def factor(x: Tensor) -> Tensor:
        return rounded(x) if narrow and on_cpu else x

    for _ in range(steps):
        gram = torch.bmm(factor(x), factor(x).mT)
        poly = torch.baddbmm(gram, factor(gram), factor(gram), beta=b, alpha=c)
        x = torch.baddbmm(x, factor(poly), factor(x), beta=a)
    x = x.to(g_BMN.dtype)
    return x.mT if g_BMN.shape[1] > g_BMN.shape[2] else x


def orthogonalize(g_BMN: Tensor, steps: int = 5, narrow: bool = False) -> Tensor:
    """As the reference. Float32 on a CPU goes matrix by matrix, each in a thread's own cache, if there are enough for all.
    `narrow`, on a CPU: only if its processor multiplies bfloat16."""
    threads = torch.get_num_threads()
    narrow = narrow and (g_BMN.device.type != "cpu" or own_products_faster(narrow=True))
    if len(g_BMN) < threads or not training_kernels_take(g_BMN):
        return orthogonalize_reference(g_BMN, steps, narrow)
    g = g_BMN.contiguous()
    out = torch.empty_like(g)
    kernels().cadre_orthogonalize(g.data_ptr(), *g.shape, steps, _coefficients(), _factors(narrow), threads, out.data_ptr())
    return out


@dataclass(frozen=True)
class MuonStep:
    """What Muon does to one parameter: `weight`, `gradient` and `momentum` are of one shape, a matrix [M, N] or a batch of them
    [..., N] of `rows` rows M each.

    momentum <- beta momentum + (1 - beta) gradient; u = beta momentum + (1 - beta) gradient (Nesterov's); and
    weight <- keep weight + rate orthogonalized(u), after so many `iterations`.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    rows: int
    iterations: int
    beta: float
    keep: float
    rate: float

    @property
    def batch(self) -> int:
        """How many matrices; of one matrix that other processes have rows of too: 1."""
        return 1 if self.weight.ndim == 2 else self.weight.numel() // (self.rows * self.weight.shape[-1])

    def nesterov(self) -> Tensor:
        """Step the momentum. Returns u as [B, M, N]."""
        self.momentum.lerp_(self.gradient, 1 - self.beta)
        update = self.gradient.lerp(self.momentum, self.beta)
        return update[None] if update.ndim == 2 else update.reshape(self.batch, self.rows, update.shape[-1])

    def apply(self, update_BMN: Tensor) -> None:
        self.weight.mul_(self.keep).add_(update_BMN.reshape(self.weight.shape), alpha=self.rate)


def muon_reference(steps: Sequence[MuonStep], narrow: bool = False) -> None:
    """One parameter after the other."""
    for step in steps:
        step.apply(orthogonalize_reference(step.nesterov(), step.iterations, narrow))


def muon_in_place(steps: Sequence[MuonStep], narrow: bool = False) -> bool:
    """As the reference, without room for the updates, by one pass over each matrix in a thread's own cache. False, and nothing
    done, where there is no kernel for it: of other tensors than float32 on a CPU that lie in one piece, and for fewer matrices
    than threads."""
    threads = torch.get_num_threads()
    tensors = [tensor for step in steps for tensor in (step.weight, step.gradient, step.momentum)]
    if (
        sum(step.batch for step in steps) < threads
        or not training_kernels_take(*tensors)
        or not all(tensor.is_contiguous() for tensor in tensors)
    ):
        return False
    native = (structs.MuonStep * len(steps))(*map(_native, steps))
    kernels().cadre_muon(native, len(steps), _coefficients(), _factors(narrow), threads)
    return True


def _native(step: MuonStep) -> structs.MuonStep:
    pointers = (tensor.data_ptr() for tensor in (step.weight, step.gradient, step.momentum))
    sizes = (step.batch, step.rows, step.weight.shape[-1])
    return structs.MuonStep(*pointers, *sizes, step.iterations, step.beta, step.keep, step.rate)


def _coefficients() -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 3)(*_COEFFICIENTS)


def _factors(narrow: bool) -> int:
    return int(narrow and own_products_faster(narrow=True))
