"""One stage of a pipeline: a run of a model's blocks, as a model that begins with hidden states or ends with them.

Letters in names: B sequence, T position, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cadre.model.layers import Linear
from cadre.model.transformer import EVERY, Cache, Positions, Transformer
from cadre.train.objective import MicroBatch, Step, balance_losses, token_losses


class Stage(Transformer):
    """Blocks of a `whole` model, with its embedding if they are the first ones, with norm, head and multi-token prediction
    modules if they are the last; these may need an embedding too, and have a copy then (`copies_embedding`). `sums`: the losses
    of a step's micro-batches so far, as `Step.backward` gives them."""

    work: Step
    left: Iterator[MicroBatch]
    sums: Tensor

    def __init__(self, whole: Transformer, blocks: range, device: torch.device) -> None:
        nn.Module.__init__(self)
        config = self.config = whole.config
        self.compute_dtype, self.rotary = None, whole.rotary
        self.first, self.last = blocks.start == 0, blocks.stop == len(whole.layers)
        self.layers = nn.ModuleList(whole.layers[index] for index in blocks)
        self.mtp = whole.mtp if self.last else nn.ModuleList()
        if self.first:
            self.embed_tokens = whole.embed_tokens
        if not self.last:
            return
        self.norm, self.lm_head = whole.norm, whole.lm_head
        if copies_embedding(whole):
            table = torch.empty(config.vocab_size, config.hidden_size, device=device)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        if config.tie_word_embeddings:
            with torch.device("meta"):
                self.lm_head = Linear(config.hidden_size, config.vocab_size)
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(
        self, ids_BT: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None, own_T: Positions = EVERY
    ) -> Tensor:
        """As a model's, but what comes in are the hidden states [B, T, D] of the stage before, unless this is the first one,
        and only the last one norms what goes out."""
        return self._pass(ids_BT, document_BT)

    def _pass(self, x: Tensor, document_BT: Tensor | None) -> Tensor:
        turn_TR = self.rotary(0, x.shape[1], x.device)
        if self.first:
            x = self.embed(x)
        for block in self.layers:
            x = block(x, turn_TR, None, document_BT)
        return self.norm(x) if self.last else x

    def begin(self, work: Step) -> None:
        """Before a step: a call for each of its micro-batches follows."""
        self.work, self.left = work, iter(work.micro_batches)
        self.sums = torch.zeros((), dtype=torch.float64, device=self.device)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The next micro-batch: hidden states [B, T, D] of the stage before, which the first one does without, to those for the
        next stage, or to the loss, a scalar. Every schedule takes micro-batches in their order."""
        work, micro = self.work, next(self.left)
        ids, documents = micro.inputs(self)
        work.balance.listen()
        x = self._pass(ids if self.first else x, documents)
        total, main, further = x.new_zeros(()), x.new_zeros(()), [x.new_zeros(())] * self.config.num_nextn_predict_layers
        if self.last:
            total, main, further = token_losses(self, x, micro, work.mtp_weight, work.mtp_share)
        uneven, even = balance_losses(work.balance, micro, ids.shape[1], work.mtp_share)
        self.sums = self.sums + torch.stack([loss.double() for loss in (main, *further, *even.values())]) * work.share
        if self.last:
            return (total + uneven) * work.share
        return _Aside.apply(x, uneven * work.share) if isinstance(uneven, Tensor) else x


def copies_embedding(model: Transformer) -> bool:
    """Whether the last stage looks tokens up too, for multi-token prediction or a head that is the embedding."""
    return model.config.tie_word_embeddings or model.config.num_nextn_predict_layers > 0


class _Aside(torch.autograd.Function):
    """Hidden states as they are, whose backward pass is that of a loss too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.clone()  # no view: some schedules detach in place what they have sent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), device=grad.device)
