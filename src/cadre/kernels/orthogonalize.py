"""The nearest semi-orthogonal matrix, roughly, of each of a batch: what Muon makes of an update.

Letters in names: B matrix, M row, N column.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cadre.kernels.native.library import training_library, trains

# K. Jordan's quintic (2024): it pushes singular values to within about 0.7 to 1.2, which is near enough, in few steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize_reference(g_BMN: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iterations X <- a X + (b G + c G G) X with G = X X^T, from X of Frobenius norm 1: [B, M, N] in and out."""
    a, b, c = _COEFFICIENTS
    x = g_BMN.mT if g_BMN.shape[1] > g_BMN.shape[2] else g_BMN
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if g_BMN.shape[1] > g_BMN.shape[2] else x


def orthogonalize(g_BMN: Tensor, steps: int = 5) -> Tensor:
    """As the reference. Float32 on a CPU goes matrix by matrix, each in a thread's own cache, if there are enough for all."""
    threads = torch.get_num_threads()
    if len(g_BMN) < threads or not trains(g_BMN):
        return orthogonalize_reference(g_BMN, steps)
    library = training_library()
    assert library is not None
    g = g_BMN.contiguous()
    out = torch.empty_like(g)
    coefficients = (ctypes.c_float * 3)(*_COEFFICIENTS)
    library.cadre_orthogonalize(g.data_ptr(), *g.shape, steps, coefficients, threads, out.data_ptr())
    return out
