"""Context parallelism: each sequence is split over several ranks, for contexts whose activations do not fit on one rank.

The ranks of a context group read the same sequences, and each computes its own positions of them. Only attention needs other
positions. It all-gathers of all positions what a cache would keep (with latent attention one latent and one rotary key, else
the keys and values of every group), and lets the rank's own queries attend to the positions before them. Latents are expanded
into keys and values after they have been gathered, and again in the backward pass. A layer's forward pass sends own tokens x
width kept x (ranks - 1) elements from each rank, and its backward pass as many elements of gradients.

Which positions: a sequence is cut into 2c equal chunks for c ranks, and rank r has chunks r and 2c - 1 - r. So the queries of
every rank attend to equally many positions (Llama 3 report, arXiv 2407.21783, section 3.3.2, which all-gathers too).

Letters in names: B sequence, T own position, S position, D hidden, C latent, G key-value head, K key width, R rotary width,
X what is kept of a position; of a rank's queries H head, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from cadre.kernels.attention import causal_attention, latent_attention
from cadre.kernels.native.causal import attention_kernel_takes
from cadre.model.attention import GroupedQueryAttention, LatentAttention, LayerCache
from cadre.model.config import ModelConfig
from cadre.model.transformer import Block, Transformer


@dataclass
class ContextGroup:
    """The ranks that share sequences. The length of a sequence must be a multiple of twice their number. `sent_bytes`: of what
    is kept of positions and of its gradients, by all layers so far."""

    process_group: dist.ProcessGroup
    sent_bytes: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        return self.process_group.size()

    def chunks(self, length: int) -> tuple[slice, slice]:
        """The positions of this rank's two chunks of a sequence of so many positions."""
        rank, size = self.process_group.rank(), length // (2 * self.size)
        late = 2 * self.size - 1 - rank
        return slice(rank * size, (rank + 1) * size), slice(late * size, (late + 1) * size)

    def own(self, length: int, device: torch.device) -> Tensor:
        """This rank's positions in a sequence of so many: int64 [T]."""
        return torch.cat([torch.arange(chunk.start, chunk.stop, device=device) for chunk in self.chunks(length)])

    def all_gather(self, x_BTX: Tensor) -> Tensor:
        """[B, S, X] of all positions, in order, from every rank's own."""
        every = _AllGather.apply(x_BTX, self).unflatten(0, (self.size, -1))
        early, late = every.unflatten(2, (2, -1)).unbind(2)
        return torch.cat((early, late.flip(0))).transpose(0, 1).flatten(1, 2)

    def all_reduce(self, count: Tensor) -> Tensor:
        """The sum over the ranks, in place and without a gradient."""
        dist.all_reduce(count, group=self.process_group)
        return count

    def attend(self, q_BTHK: Tensor, length: int, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[B, T, H, V], of which `attend(q, stop)` computes each chunk: its queries are those of the last of the first `stop`
        positions."""
        parts = zip(q_BTHK.chunk(2, dim=1), self.chunks(length), strict=True)
        return torch.cat([attend(q, chunk.stop) for q, chunk in parts], dim=1)


class _AllGather(torch.autograd.Function):
    """Every rank's tensor, joined along the first dimension. The differentiable all-gathers of torch need NCCL or are not a
    stable API."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(group.size * len(x), *x.shape[1:])
        if x.numel():
            group.sent_bytes += x.nbytes * (group.size - 1)
            dist.all_gather(list(gathered.chunk(group.size)), x.contiguous(), group=group.process_group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group: ContextGroup = ctx.group
        received = torch.empty_like(grad, memory_format=torch.contiguous_format)
        if grad.numel():
            group.sent_bytes += grad.nbytes // group.size * (group.size - 1)
            dist.all_to_all_single(received, grad.contiguous(), group=group.process_group)
        # An all-to-all and one sum send as many bytes as a reduce-scatter, and round less: bfloat16 sums are rounded only once.
        return received.unflatten(0, (group.size, -1)).sum(dim=0), None


def _recompute_expansion(attend: Callable[[Tensor, Tensor], Tensor], q_BTHK: Tensor, kept_BSX: Tensor) -> Tensor:
    """`attend(q_BTHK, kept_BSX)` under activation checkpointing: its backward pass computes everything again but the attention
    of torch's own kernels. (Our attention kernel, which torch cannot tell apart, is computed again too.)"""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        attends = "_scaled_dot_product" in op.name()
        return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = noop_context_fn if attention_kernel_takes(q_BTHK) else partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(attend, q_BTHK, kept_BSX, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class ContextParallelLatentAttention(LatentAttention):
    """Latent attention of this rank's positions to all positions. x_BTD has the former, `turn_SR` and `document_BS` the
    latter."""

    def __init__(self, config: ModelConfig, group: ContextGroup) -> None:
        super().__init__(config)
        self.context_group = group

    def forward(
        self, x_BTD: Tensor, turn_SR: Tensor, cache: LayerCache | None = None, document_BS: Tensor | None = None
    ) -> Tensor:
        length = len(turn_SR)
        if x_BTD.shape[1] == length:  # the sequences are not split, as in an evaluation
            return super().forward(x_BTD, turn_SR, cache, document_BS)
        kept_BSX = self.context_group.all_gather(torch.cat(self.compress(x_BTD), dim=-1))
        reach = self.context_group.chunks(length)[1].stop

        def attend(q_BTHK: Tensor, kept_BSX: Tensor) -> Tensor:
            latent_BSC, k_BSR = kept_BSX[:, :reach].split((self.latent, self.rotary), dim=-1)
            kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.heads, -1))

            def chunk(q_BTHK: Tensor, stop: int) -> Tensor:
                document = None if document_BS is None else document_BS[:, :stop]
                kv, k, turn = kv_BSHX[:, :stop], k_BSR[:, :stop], turn_SR[:stop]
                return latent_attention(
                    q_BTHK, kv, k, turn, self.scale, self.interleaved, document, self.narrow, self.watched_peak_H
                )

            return self.context_group.attend(q_BTHK, length, chunk)

        # On every rank the expanded keys and values are as long as the whole sequence. Kept for the backward pass, they would
        # take more memory than splitting the sequence saves.
        out_BTHV = _recompute_expansion(attend, self.queries(x_BTD), kept_BSX)
        return self.o_proj(out_BTHV.flatten(-2))


class ContextParallelGroupedQueryAttention(GroupedQueryAttention):
    """Grouped-query attention of this rank's positions to all positions. x_BTD has the former, `turn_SR` and `document_BS` the
    latter."""

    def __init__(self, config: ModelConfig, group: ContextGroup) -> None:
        super().__init__(config)
        self.context_group = group

    def forward(
        self, x_BTD: Tensor, turn_SR: Tensor, cache: LayerCache | None = None, document_BS: Tensor | None = None
    ) -> Tensor:
        length = len(turn_SR)
        if x_BTD.shape[1] == length:
            return super().forward(x_BTD, turn_SR, cache, document_BS)
        turn_TR = turn_SR[self.context_group.own(length, turn_SR.device)]
        q_BTHK, k_BTGK, v_BTGK = self.projected(x_BTD, turn_TR)
        kept_BSX = self.context_group.all_gather(torch.cat((k_BTGK, v_BTGK), dim=-1).flatten(-2))
        k_BSGK, v_BSGK = kept_BSX.unflatten(-1, (self.groups, -1)).chunk(2, dim=-1)

        def chunk(q_BTHK: Tensor, stop: int) -> Tensor:
            document = None if document_BS is None else document_BS[:, :stop]
            return causal_attention(
                q_BTHK, k_BSGK[:, :stop], v_BSGK[:, :stop], self.scale, document, self.narrow, self.watched_peak_H
            )

        return self.o_proj(self.context_group.attend(q_BTHK, length, chunk).flatten(-2))


def use_context_parallel_attention(model: Transformer, group: ContextGroup) -> None:
    """Replace the attention of every block of a model on the meta device."""
    latent = model.config.attention == "latent"
    attention = ContextParallelLatentAttention if latent else ContextParallelGroupedQueryAttention
    for module in model.modules():
        if isinstance(module, Block):
            with torch.device("meta"):
                module.self_attn = attention(model.config, group)
