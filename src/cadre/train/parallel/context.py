"""Context parallelism: a sequence cut over ranks, for contexts whose activations one rank cannot hold.

The ranks of a context group read the same sequences; each computes its own positions of them, and attention alone looks
further. It fetches of all positions what a cache would keep – with latent attention one latent and one rotary key, else the
keys and values of every group –, and lets its own queries see what is before them; latents are expanded where they are
needed, and again in the backward pass. A layer's forward pass sends own tokens x kept width x (ranks - 1) elements from each
rank, and its backward pass as many of their gradients.

The cut is a zigzag: of 2c equal chunks rank r has chunks r and 2c - 1 - r, which see as much as any other rank's two (Llama 3
report, arXiv 2407.21783, section 3.3.2, as is the all-gather).

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
from cadre.kernels.native.causal import takes
from cadre.model.attention import GroupedQueryAttention, LatentAttention, LayerCache
from cadre.model.config import ModelConfig
from cadre.model.transformer import Block, Transformer


@dataclass
class Context:
    """The ranks that share sequences. Lengths must be multiples of twice their number. `sent_bytes`: of what is kept of
    positions and of its gradients, by all layers so far."""

    group: dist.ProcessGroup
    sent_bytes: int = field(default=0, init=False)

    @property
    def ranks(self) -> int:
        return self.group.size()

    def chunks(self, length: int) -> tuple[slice, slice]:
        """This rank's two runs of a sequence's positions."""
        rank, size = self.group.rank(), length // (2 * self.ranks)
        late = 2 * self.ranks - 1 - rank
        return slice(rank * size, (rank + 1) * size), slice(late * size, (late + 1) * size)

    def own(self, length: int, device: torch.device) -> Tensor:
        """This rank's positions of a sequence, int64 [T]."""
        return torch.cat([torch.arange(chunk.start, chunk.stop, device=device) for chunk in self.chunks(length)])

    def fetch(self, x_BTX: Tensor) -> Tensor:
        """All positions' [B, S, X], from every rank's own."""
        every = _Gather.apply(x_BTX, self).unflatten(0, (self.ranks, -1))
        early, late = every.unflatten(2, (2, -1)).unbind(2)
        return torch.cat((early, late.flip(0))).transpose(0, 1).flatten(1, 2)

    def add(self, count: Tensor) -> Tensor:
        """The sum over the ranks, without a gradient, in place."""
        dist.all_reduce(count, group=self.group)
        return count

    def attend(self, q_BTHK: Tensor, length: int, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[B, T, H, V] from `attend(queries, stop)` for each chunk: queries of the last ones of the first `stop` positions."""
        parts = zip(q_BTHK.chunk(2, dim=1), self.chunks(length), strict=True)
        return torch.cat([attend(q, chunk.stop) for q, chunk in parts], dim=1)


class _Gather(torch.autograd.Function):
    """Every rank's tensor, along the first dimension. torch's own differentiable ones want NCCL or change their names."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        gathered = x.new_empty(context.ranks * len(x), *x.shape[1:])
        if x.numel():
            context.sent_bytes += x.nbytes * (context.ranks - 1)
            dist.all_gather(list(gathered.chunk(context.ranks)), x.contiguous(), group=context.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        context: Context = ctx.context
        shares = torch.empty_like(grad, memory_format=torch.contiguous_format)
        if grad.numel():
            context.sent_bytes += grad.nbytes // context.ranks * (context.ranks - 1)
            dist.all_to_all_single(shares, grad.contiguous(), group=context.group)
        # Added up here, all at once, bfloat16 loses less than by a reduce-scatter, and the bytes are the same.
        return shares.unflatten(0, (context.ranks, -1)).sum(dim=0), None


def _expand_again(attend: Callable[[Tensor, Tensor], Tensor], q_BTHK: Tensor, kept_BSX: Tensor) -> Tensor:
    """`attend(q_BTHK, kept_BSX)`, of which the backward pass repeats all but the attention of torch's own kernels. (Ours, which
    torch does not know of, is repeated too.)"""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        attends = "_scaled_dot_product" in op.name()
        return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = noop_context_fn if takes(q_BTHK) else partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(attend, q_BTHK, kept_BSX, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class CutLatentAttention(LatentAttention):
    """Latent attention of this rank's positions x_BTD to all: `turn_SR` and `document_BS` are of all of them."""

    def __init__(self, config: ModelConfig, context: Context) -> None:
        super().__init__(config)
        self.context = context

    def forward(
        self, x_BTD: Tensor, turn_SR: Tensor, cache: LayerCache | None = None, document_BS: Tensor | None = None
    ) -> Tensor:
        length = len(turn_SR)
        if x_BTD.shape[1] == length:  # nothing is elsewhere, as in an evaluation
            return super().forward(x_BTD, turn_SR, cache, document_BS)
        kept_BSX = self.context.fetch(torch.cat(self.compress(x_BTD), dim=-1))
        reach = self.context.chunks(length)[1].stop

        def attend(q_BTHK: Tensor, kept_BSX: Tensor) -> Tensor:
            latent_BSC, k_BSR = kept_BSX[:, :reach].split((self.latent, self.rotary), dim=-1)
            kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.heads, -1))

            def chunk(q_BTHK: Tensor, stop: int) -> Tensor:
                document = None if document_BS is None else document_BS[:, :stop]
                kv, k, turn = kv_BSHX[:, :stop], k_BSR[:, :stop], turn_SR[:stop]
                return latent_attention(
                    q_BTHK, kv, k, turn, self.scale, self.interleaved, document, self.narrow, self.watched_peak_H
                )

            return self.context.attend(q_BTHK, length, chunk)

        # Expanded keys and values are as long as the sequence on every rank: kept for the backward pass, they would outweigh
        # all that cutting it saves.
        out_BTHV = _expand_again(attend, self.queries(x_BTD), kept_BSX)
        return self.o_proj(out_BTHV.flatten(-2))


class CutGroupedQueryAttention(GroupedQueryAttention):
    """Grouped-query attention of this rank's positions x_BTD to all: `turn_SR` and `document_BS` are of all of them."""

    def __init__(self, config: ModelConfig, context: Context) -> None:
        super().__init__(config)
        self.context = context

    def forward(
        self, x_BTD: Tensor, turn_SR: Tensor, cache: LayerCache | None = None, document_BS: Tensor | None = None
    ) -> Tensor:
        length = len(turn_SR)
        if x_BTD.shape[1] == length:
            return super().forward(x_BTD, turn_SR, cache, document_BS)
        turn_TR = turn_SR[self.context.own(length, turn_SR.device)]
        q_BTHK, k_BTGK, v_BTGK = self.projected(x_BTD, turn_TR)
        kept_BSX = self.context.fetch(torch.cat((k_BTGK, v_BTGK), dim=-1).flatten(-2))
        k_BSGK, v_BSGK = kept_BSX.unflatten(-1, (self.groups, -1)).chunk(2, dim=-1)

        def chunk(q_BTHK: Tensor, stop: int) -> Tensor:
            document = None if document_BS is None else document_BS[:, :stop]
            return causal_attention(
                q_BTHK, k_BSGK[:, :stop], v_BSGK[:, :stop], self.scale, document, self.narrow, self.watched_peak_H
            )

        return self.o_proj(self.context.attend(q_BTHK, length, chunk).flatten(-2))


def cut_attention(model: Transformer, context: Context) -> None:
    """Give every block of a model without storage an attention that knows of other ranks' positions."""
    cut = CutLatentAttention if model.config.attention == "latent" else CutGroupedQueryAttention
    for module in model.modules():
        if isinstance(module, Block):
            with torch.device("meta"):
                module.self_attn = cut(model.config, context)
