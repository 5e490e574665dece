"""The gated activation of every feed-forward layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise over any shape (arXiv 2002.05202)."""
    return F.silu(gate) * up
