"""One stage of a pipeline: consecutive blocks of a model, as a module from hidden states to hidden states; the first stage
begins with ids and the last one ends with the loss.

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
    """Some blocks of the model `whole`. The first stage has the embedding too, the last one norm, head and multi-token
    prediction modules, and a copy of the embedding if these need it (`copies_embedding`). `sums`: the losses of a step's
    micro-batches so far, as `Step.backward` gives them. `remaining`: the step's micro-batches still to come."""

    work: Step
    remaining: Iterator[MicroBatch]
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
        """As `Transformer.hidden`, but a stage that is not the first takes the hidden states [B, T, D] of the stage before in
        place of ids, and only the last one applies the final norm."""
        return self._pass(ids_BT, document_BT)

    def _pass(self, x: Tensor, document_BT: Tensor | None) -> Tensor:
        turn_TR = self.rotary(x.shape[1], x.device)
        if self.first:
            x = self.embed(x)
        for block in self.layers:
            x = block(x, turn_TR, None, document_BT)
        return self.norm(x) if self.last else x

    def begin(self, work: Step) -> None:
        """Start a step. One call of `forward` for each of its micro-batches must follow."""
        self.work, self.remaining = work, iter(work.micro_batches)
        self.sums = torch.zeros((), dtype=torch.float64, device=self.device)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The step's next micro-batch: every schedule takes them in order. x: the hidden states [B, T, D] of the stage before;
        the first stage ignores it. Returns the hidden states for the next stage, or, from the last one, the loss, a scalar."""
        work, micro = self.work, next(self.remaining)
        ids, documents = micro.inputs(self)
        work.balance.record()
        x = self._pass(ids if self.first else x, documents)
        total, main, mtp = x.new_zeros(()), x.new_zeros(()), [x.new_zeros(())] * self.config.num_nextn_predict_layers
        if self.last:
            total, main, mtp = token_losses(self, x, micro, work.mtp_weight, work.mtp_share)
        uneven, even = balance_losses(work.balance, micro, ids.shape[1], work.mtp_share)
        self.sums = self.sums + torch.stack([loss.double() for loss in (main, *mtp, *even.values())]) * work.share
        if self.last:
            return (total + uneven) * work.share
        return _WithLoss.apply(x, uneven * work.share) if isinstance(uneven, Tensor) else x


def copies_embedding(model: Transformer) -> bool:
    """Whether the last stage needs the embedding: for multi-token prediction, or for a head that is tied to it."""
    return model.config.tie_word_embeddings or model.config.num_nextn_predict_layers > 0


class _WithLoss(torch.autograd.Function):
    """Returns the hidden states unchanged. The backward pass adds a gradient of 1 for `loss`, as if it were part of the
    total."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.clone()  # not a view: some schedules detach in place what they have sent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), device=grad.device)
