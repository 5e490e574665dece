"""What training minimises: next-token loss, further-token losses, balance losses.

Letters in names: B sequence, T position, N = B*T, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cadre.kernels.loss import linear_cross_entropy
from cadre.model.transformer import Transformer
from cadre.train.balance import Balance


@dataclass
class Losses:
    """`total` carries the gradient; the others are detached float32 scalars: nats per token of the main head and of each
    multi-token prediction module, and by its key the mean over sparse layers of each balance loss in use."""

    total: Tensor
    main: Tensor
    further: list[Tensor]
    balance: dict[str, Tensor]


def losses(
    model: Transformer,
    ids_BT: Tensor,
    document_BT: Tensor | None,
    balance: Balance,
    *,
    mtp_weight: float,
    mtp_rows: int | None = None,
    mtp_share: float = 1.0,
    joined: bool = False,
) -> Losses:
    """Losses of a batch of int64 ids [B, T + 1 + modules]: inputs are the first T, targets reach one further per stage.

    The multi-token losses are averaged over modules and weighted (V3 report, equation 25); they are taken on the first
    `mtp_rows` sequences (all of them if None) and divided by `mtp_share`, the share of the whole batch that these rows and
    those of its other micro-batches make up. `joined`: the modules are passed through even with no rows, because other
    processes, which have some, cannot do without this one. With documents, attention and the targets of the modules stay
    inside a document; the first token of the next document remains the main head's.
    Every loss is divided by all N positions (as equation 24 has it), so that micro-batches add up to their batch.
    The balance losses are summed over layers; the step's loads are counted on the way.
    """
    depth = len(model.mtp)
    length = ids_BT.shape[1] - 1 - depth
    inside = None if document_BT is None else document_BT[:, :length]
    positions = ids_BT.shape[0] * length
    mean_N = torch.full((positions,), 1 / positions, device=ids_BT.device)

    rows = len(ids_BT) if mtp_rows is None else mtp_rows
    balance.listen()
    stages = _stages(model, ids_BT, inside, rows, joined)
    hidden = next(stages)
    head = model.lm_head.weight
    main = linear_cross_entropy(hidden.flatten(0, 1), head, ids_BT[:, 1 : length + 1].flatten(), mean_N)
    total = main
    further = []
    module_part = rows / (len(ids_BT) * mtp_share)
    mean_N = mean_N[: rows * length] / mtp_share
    ids_BT = ids_BT[:rows]
    if document_BT is not None and inside is not None:
        document_BT, inside = document_BT[:rows], inside[:rows]
    for stage in range(depth):
        if not rows and not joined:
            further.append(torch.zeros_like(main))
            continue
        hidden = next(stages)
        reach = slice(stage + 2, length + stage + 2)
        weight_N = mean_N
        if document_BT is not None and inside is not None:
            weight_N = mean_N * (document_BT[:, reach] == inside).flatten()
        loss = linear_cross_entropy(hidden.flatten(0, 1), head, ids_BT[:, reach].flatten(), weight_N)
        further.append(loss.detach())
        if mtp_weight:
            total = total + loss * (mtp_weight / depth)

    heard = balance.hear(length, module_part)
    balance.count(heard)
    even = {}
    for key, weight, value in balance.weighted(heard):
        total = total + weight * value
        even[key] = value.detach() / len(balance.layers)
    return Losses(total, main.detach(), further, even)


@torch.no_grad()
def survey(
    model: Transformer,
    ids_BT: Tensor,
    document_BT: Tensor | None,
    balance: Balance,
    *,
    mtp_rows: int | None = None,
    joined: bool = False,
) -> None:
    """Let the global balance loss see a micro-batch before the first one of the step is trained: a forward pass without
    head, for what `losses` will be given."""
    length = ids_BT.shape[1] - 1 - len(model.mtp)
    inside = None if document_BT is None else document_BT[:, :length]
    balance.listen()
    for _ in _stages(model, ids_BT, inside, len(ids_BT) if mtp_rows is None else mtp_rows, joined):
        pass
    balance.survey(balance.hear(length))


def _stages(
    model: Transformer, ids_BT: Tensor, inside_BT: Tensor | None, rows: int, joined: bool
) -> Iterator[Tensor]:
    """Normed hidden states of the main model, then, of the first `rows` sequences, those of each further module."""
    length = ids_BT.shape[1] - 1 - len(model.mtp)
    hidden = model.hidden(ids_BT[:, :length], document_BT=inside_BT)
    yield hidden
    if not rows and not joined:
        return
    hidden, ids_BT = hidden[:rows], ids_BT[:rows]
    inside_BT = None if inside_BT is None else inside_BT[:rows]
    for stage in range(len(model.mtp)):
        following_BT = ids_BT[:, stage + 1 : length + stage + 1]
        hidden = model.further_hidden(hidden, following_BT, stage, document_BT=inside_BT)
        yield hidden
