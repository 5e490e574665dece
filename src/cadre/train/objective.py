"""What training minimises: next-token loss, further-token losses, sequence-wise balance.

Letters in names: B sequence, T position, N = B*T, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cadre.kernels.loss import linear_cross_entropy
from cadre.model.transformer import Transformer
from cadre.train.balance import Balance, sequence_balance_loss


@dataclass
class Losses:
    """`total` carries the gradient; the others are detached float32 scalars: nats per token of the main head and of each
    multi-token prediction module, and the mean sequence-wise balance loss (None without experts or weight)."""

    total: Tensor
    main: Tensor
    further: list[Tensor]
    balance: Tensor | None


def losses(
    model: Transformer,
    ids_BT: Tensor,
    document_BT: Tensor | None,
    balance: Balance,
    *,
    mtp_weight: float,
    mtp_rows: int | None = None,
    mtp_share: float = 1.0,
    sequence_weight: float,
) -> Losses:
    """Losses of a batch of int64 ids [B, T + 1 + modules]: inputs are the first T, targets reach one further per stage.

    The multi-token losses are averaged over modules and weighted (V3 report, equation 25); they are taken on the first
    `mtp_rows` sequences (all of them if None) and divided by `mtp_share`, the share of the whole batch that these rows and
    those of its other micro-batches make up. With documents, attention and the targets of the modules stay inside a
    document; the first token of the next document remains the main head's.
    Every loss is divided by all N positions (as equation 24 has it), so that micro-batches add up to their batch.
    """
    depth = len(model.mtp)
    length = ids_BT.shape[1] - 1 - depth
    inside = None if document_BT is None else document_BT[:, :length]
    positions = ids_BT.shape[0] * length
    mean_N = torch.full((positions,), 1 / positions, device=ids_BT.device)

    hidden = model.hidden(ids_BT[:, :length], document_BT=inside)
    head = model.lm_head.weight
    main = linear_cross_entropy(hidden.flatten(0, 1), head, ids_BT[:, 1 : length + 1].flatten(), mean_N)
    total = main
    further = []
    rows = len(ids_BT) if mtp_rows is None else mtp_rows
    mean_N = mean_N[: rows * length] / mtp_share
    ids_BT, hidden = ids_BT[:rows], hidden[:rows]
    if document_BT is not None and inside is not None:
        document_BT, inside = document_BT[:rows], inside[:rows]
    for stage in range(depth):
        if not rows:
            further.append(torch.zeros_like(main))
            continue
        hidden = model.further_hidden(hidden, ids_BT[:, stage + 1 : length + stage + 1], stage, document_BT=inside)
        reach = slice(stage + 2, length + stage + 2)
        weight_N = mean_N
        if document_BT is not None and inside is not None:
            weight_N = mean_N * (document_BT[:, reach] == inside).flatten()
        loss = linear_cross_entropy(hidden.flatten(0, 1), head, ids_BT[:, reach].flatten(), weight_N)
        further.append(loss.detach())
        if mtp_weight:
            total = total + loss * (mtp_weight / depth)

    routes = balance.read()
    even = None
    if routes and sequence_weight:
        even = torch.stack([sequence_balance_loss(route, len(route.score_TE) // length) for route in routes]).sum()
        total = total + sequence_weight * even
        even = even.detach() / len(routes)
    return Losses(total, main.detach(), further, even)
