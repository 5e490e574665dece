"""What torch is asked to do where a kernel of ours takes its place: operations, each a launch on a card, and the bytes that
they read and write.

    python -m tests.card.launches
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cadre.infer import runner
from cadre.infer.pages import PagePool
from cadre.infer.runner import Batch, PagedCache
from cadre.kernels import loss
from cadre.kernels.permute import sum_choices
from cadre.kernels.swiglu import swiglu
from cadre.model.attention import LatentAttention
from cadre.model.rope import RotaryTable
from tests.shapes import small


class Counting(TorchDispatchMode):
    """Operations that compute something, and the bytes of the tensors they take and give: neither views nor empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in returned)
        if not view and "empty" not in str(func) and "_unsafe_view" not in str(func):
            self.operations += 1
            flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in flat if isinstance(leaf, Tensor))
        return out


def attention(sequences: int, kernel: bool) -> int:
    """Operations of one layer's attention when each of some sequences of 64 tokens, on scattered pages, gets one more."""
    config = small("deepseek_v3", max_position_embeddings=128)
    module, pool = LatentAttention(config), PagePool(config, pages=6 * sequences, page_size=16, dtype=torch.float32)
    page_BP = torch.arange(6 * sequences, dtype=torch.int32).view(sequences, 6).flip(1)
    ids_T, position_T = torch.zeros(sequences, dtype=torch.int64), torch.full((sequences,), 64)
    batch = Batch(ids_T, position_T, [1] * sequences, [64] * sequences, page_BP)
    cache = PagedCache(pool, batch)
    turn_TR = RotaryTable(config).at(cache.position_T, cache.stop)
    x_BTD = torch.randn(1, sequences, config.hidden_size)
    launched = mock.Mock(side_effect=lambda q_THC, *_: torch.empty_like(q_THC))
    standing = mock.Mock(latent_decode=launched)  # which needs no Triton to be counted
    with (
        torch.inference_mode(), mock.patch.object(runner, "_takes", return_value=kernel),
        mock.patch.dict("sys.modules", {"cadre.kernels.latent_triton": standing}), Counting() as counting,
    ):  # fmt: skip
        module(x_BTD, turn_TR, cache.layer(0))
    return counting.operations + 2 * launched.call_count


def torch_of(function: Any, *parts: Tensor) -> Counting:
    with Counting() as counting:
        function(*parts)
    return counting


if __name__ == "__main__":
    for sequences in (1, 16, 64):
        before, after = (attention(sequences, kernel) for kernel in (False, True))
        print(f"attention of a layer, {sequences:2} sequences decode: {before} operations, with the kernel {after}")
    N, W = 64, 4096
    counted = torch_of(lambda x, *rest: loss._cross_entropy(x, *rest, True), torch.zeros(N, W).bfloat16(),
                       torch.zeros(N, dtype=torch.int64), torch.ones(N))  # fmt: skip
    print(
        f"cross-entropy and its gradient: {counted.operations} operations, {counted.bytes / N / W:.1f} bytes a logit; ours 2, 6"
    )
    gate_up = torch.zeros(64, 2048, dtype=torch.bfloat16, requires_grad=True)
    counted = torch_of(lambda x: swiglu(x).backward(torch.ones(64, 1024, dtype=torch.bfloat16)), gate_up)
    each = counted.bytes / 64 / 1024
    print(
        f"SwiGLU forward and backward: {counted.operations} operations, {each:.0f} bytes an element of its output; ours 2, 16"
    )
    T, K, D = 256, 8, 1024
    y, weight = torch.zeros(T * K, D, dtype=torch.bfloat16, requires_grad=True), torch.ones(T, K, requires_grad=True)
    out = sum_choices(y, weight, torch.arange(T * K).view(T, K), torch.arange(T * K) // K)
    counted = torch_of(lambda grad: out.backward(grad), torch.ones_like(out))
    each = counted.bytes / T / K / D
    print(f"the combination backward: {counted.operations} operations, {each:.1f} bytes an element of a row; ours 1, 6")
