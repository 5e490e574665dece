"""The norm of all gradients together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cadre.kernels.native.library import kernels, training_kernels_take
from cadre.kernels.native.structs import Span


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of all tensors together, []; of float32 on a CPU in one pass over memory."""
    if not (training_kernels_take(*tensors) and all(tensor.is_contiguous() for tensor in tensors)):
        return torch.nn.utils.get_total_norm(tensors)
    spans = (Span * len(tensors))(*(Span(tensor.data_ptr(), tensor.numel()) for tensor in tensors))
    norm = kernels().cadre_total_norm(spans, len(tensors), torch.get_num_threads())
    return torch.tensor(norm, dtype=torch.float32, device="cpu")
