"""What training minimises: next-token loss, multi-token losses, balance losses.

Letters in names: B sequence, T position, N = B*T, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cadre.kernels.loss import linear_cross_entropy
from cadre.model.transformer import EVERY, Positions, Transformer
from cadre.train.balance import Balance


@dataclass
class Losses:
    """`total` carries the gradient; the others are detached float32 scalars: nats per token of the main head and of each
    multi-token prediction module, and by its key the mean over sparse layers of each balance loss in use."""

    total: Tensor
    main: Tensor
    mtp: list[Tensor]
    balance: dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """int64 ids [B, T + 1 + modules] and, unless None, their documents, alike: inputs are the first T, targets reach one
    further per module. `mtp_rows`: how many of its first sequences train the multi-token prediction modules, if not all.
    `joined`: run the modules even if no sequence here trains them: other processes, where some do, wait for this one in
    collectives. `own_T`: of sequences that several processes share, the positions that this one computes, and whose losses are
    its own. `weight_BT`: float32, as the ids: how much the loss of each token counts, on average 1 over the targets of the
    whole batch; None: all alike."""

    ids_BT: Tensor
    document_BT: Tensor | None = None
    mtp_rows: int | None = None
    joined: bool = False
    own_T: Positions = field(default_factory=lambda: EVERY)
    weight_BT: Tensor | None = None

    @property
    def training_mtp(self) -> int:
        """The number of its first sequences that train the modules."""
        return len(self.ids_BT) if self.mtp_rows is None else self.mtp_rows

    def inputs(self, model: Transformer) -> tuple[Tensor, Tensor | None]:
        """ids and documents that the main model reads: [B, T]."""
        length = self.ids_BT.shape[1] - 1 - model.config.num_nextn_predict_layers
        return self.ids_BT[:, :length], None if self.document_BT is None else self.document_BT[:, :length]


@dataclass(frozen=True)
class Step:
    """The work of one optimizer step: micro-batches, each `share` of the whole batch. `mtp_weight`: of the multi-token
    losses; `mtp_share`: what part of all sequences they are taken on, in whichever micro-batch."""

    micro_batches: list[MicroBatch]
    balance: Balance
    share: float
    mtp_weight: float
    mtp_share: float

    def backward(self, model: Transformer) -> Tensor:
        """Add the gradients of all micro-batches. Returns their part of the batch's losses, float64 [1 + modules + balance
        losses in use], in the order of `Losses`."""
        sums: Tensor | float = 0.0
        for micro in self.micro_batches:
            loss = losses(model, micro, self.balance, mtp_weight=self.mtp_weight, mtp_share=self.mtp_share)
            (loss.total * self.share).backward()
            sums = sums + torch.stack([loss.main, *loss.mtp, *loss.balance.values()]).double() * self.share
        assert isinstance(sums, Tensor)
        return sums

    def collect_loads(self, model: Transformer) -> None:
        """Let the global balance loss see all micro-batches before the first one is trained."""
        for micro in self.micro_batches:
            collect_loads(model, micro, self.balance)


def losses(model: Transformer, micro: MicroBatch, balance: Balance, *, mtp_weight: float, mtp_share: float = 1.0) -> Losses:
    """Losses of a micro-batch.

    The multi-token losses are averaged over modules and weighted (V3 report, equation 25); they are taken on its first
    `mtp_rows` sequences and divided by `mtp_share`, the share of the whole batch that these rows and those of its other
    micro-batches make up. With documents, attention and the targets of the modules stay inside a document; the first token
    of the next document remains the main head's.
    Every loss is divided by all N positions (as equation 24 has it), so that micro-batches add up to their batch; weights are
    such that this is the mean over the tokens which count.
    The balance losses are summed over layers; the step's loads are counted on the way.
    """
    balance.record()
    ids, documents = micro.inputs(model)
    hidden = model.hidden(ids, document_BT=documents, own_T=micro.own_T)
    total, main, mtp = token_losses(model, hidden, micro, mtp_weight, mtp_share)
    uneven, even = balance_losses(balance, micro, hidden.shape[1], mtp_share)
    return Losses(total + uneven, main, mtp, even)


def token_losses(
    model: Transformer, hidden_BTD: Tensor, micro: MicroBatch, mtp_weight: float, mtp_share: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`Losses.total` without balance, `main` and `mtp` of a micro-batch, from the main model's normed hidden states of its
    own positions."""
    depth, length = len(model.mtp), hidden_BTD.shape[1]
    ids, inside = micro.inputs(model)
    every = ids.shape[1]
    mean_N = torch.full((len(ids) * length,), 1 / (len(ids) * length), device=ids.device)

    def mean_loss(hidden_BTD: Tensor, ahead: int, weight_N: Tensor) -> Tensor:
        """Of the tokens that lie so far ahead of the first rows' positions."""
        rows, targets = len(hidden_BTD), slice(ahead, every + ahead)
        target_BT = micro.ids_BT[:rows, targets][:, micro.own_T]
        if micro.weight_BT is not None:
            weight_N = weight_N * micro.weight_BT[:rows, targets][:, micro.own_T].flatten()
        head = model.lm_head
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), head.weight, target_BT.flatten(), weight_N, head.narrow)

    total = mean_loss(hidden_BTD, 1, mean_N)
    main = total.detach()
    rows = micro.training_mtp
    modules = mtp_hidden(model, hidden_BTD, micro)
    mean_N = mean_N[: rows * length] / mtp_share
    mtp = []
    for ahead in range(2, depth + 2):
        if not rows and not micro.joined:
            mtp.append(torch.zeros_like(main))
            continue
        weight_N = mean_N
        if micro.document_BT is not None and inside is not None:
            # The token that ends a document counts to the next one and is this one's to predict: what stands before it decides.
            stays_BT = micro.document_BT[:rows, ahead - 1 : every + ahead - 1] == inside[:rows]
            weight_N = mean_N * stays_BT[:, micro.own_T].flatten()
        # Without a weight nothing of a module is trained, its router neither: FSDP would not gather a block for the backward
        # pass of a balance loss alone, and processes whose sequences train no module would have no gradient to add.
        with nullcontext() if mtp_weight else torch.no_grad():
            loss = mean_loss(next(modules), ahead, weight_N)
        mtp.append(loss.detach())
        if mtp_weight:
            total = total + loss * (mtp_weight / depth)
    return total, main, mtp


def balance_losses(
    balance: Balance, micro: MicroBatch, length: int, mtp_share: float
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The weighted sum of the balance losses of what `balance` has recorded of the last forward pass, `length` positions of
    each sequence, and `Losses.balance`. Counts the loads."""
    recorded = balance.recorded(length, micro.training_mtp / (len(micro.ids_BT) * mtp_share))
    balance.count(recorded)
    total: Tensor | float = 0.0
    even = {}
    for key, weight, value in balance.weighted_losses(recorded):
        total = total + weight * value
        even[key] = value.detach() / len(balance.layers)
    return total, even


@torch.no_grad()
def collect_loads(model: Transformer, micro: MicroBatch, balance: Balance) -> None:
    """Let the global balance loss see a micro-batch before the first one of the step is trained: a forward pass without
    head, for what `losses` will be given."""
    balance.record()
    ids, documents = micro.inputs(model)
    hidden = model.hidden(ids, document_BT=documents, own_T=micro.own_T)
    for _ in mtp_hidden(model, hidden, micro):
        pass
    balance.collect_loads(balance.recorded(hidden.shape[1]))


def mtp_hidden(model: Transformer, hidden_BTD: Tensor, micro: MicroBatch) -> Iterator[Tensor]:
    """Normed hidden states of each multi-token prediction module, of the sequences that train them."""
    if not micro.training_mtp and not micro.joined:
        return
    rows, (ids, inside) = micro.training_mtp, micro.inputs(model)
    hidden_BTD = hidden_BTD[:rows]
    inside = None if inside is None else inside[:rows]
    for depth in range(len(model.mtp)):
        following_BT = micro.ids_BT[:rows, depth + 1 : ids.shape[1] + depth + 1]
        hidden_BTD = model.mtp_hidden(hidden_BTD, following_BT, depth, document_BT=inside, own_T=micro.own_T)
        yield hidden_BTD
