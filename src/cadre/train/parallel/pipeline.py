"""Pipeline parallelism: the model's blocks cut into stages, which micro-batches pass one after the other.

A process holds its stages alone; of the rest of the model it has router biases, which every process moves alike, and tensors
without storage. Which stage computes when is the schedule's business, and torch's: 1F1B (arXiv 2006.09503), interleaved (arXiv
2104.04473, section 2.2), ZB-V (arXiv 2401.10241, section 6), DualPipeV (after arXiv 2412.19437, section 3.2.1).

What travels is hidden states one way and their gradients the other. Each stage adds the balance losses of its own layers to
the gradient; losses and loads are then added up over all processes, as ever. The last stage looks tokens up for multi-token
prediction, and for a head tied to the embedding, in a copy of the embedding: its gradient goes to the first stage, which
trains the one that counts, and every step begins with its values.

Letters in names: B sequence, T position, D hidden.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cadre.model.transformer import EVERY, Cache, Positions, Transformer
from cadre.train.objective import Step, further_hidden
from cadre.train.parallel.layout import Layout
from cadre.train.parallel.stage import Stage, copies_embedding

if TYPE_CHECKING:
    from torch.distributed.pipelining.schedules import _PipelineSchedule

    from cadre.train.parallel.shard import Part

_TABLE = "embed_tokens.weight"


class Pipeline:
    """This process's stages, by their number, and the passages through all. `rank`: this process; `wait`: how long it waits
    for another. Processes must call the same methods in the same order; but of those for an evaluation the ones that are
    `ahead`, with the last stage, call `scored` and `done`, and the others `follow` meanwhile."""

    def __init__(self, model: Transformer, layout: Layout, rank: int, device: torch.device, wait: timedelta) -> None:
        self.model, self.layout, self.device = model, layout, device
        self.places = layout.places
        ranks = torch.arange(layout.pipeline * layout.data).view(layout.pipeline, layout.data)
        # Of the same sequences, stage after stage; and of the same stages, all sequences.
        self.group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=wait)
        self.alike, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=wait)
        self.place = rank // layout.data
        self.stages = {
            number: Stage(model, blocks, device)
            for number, blocks in enumerate(layout.stages)
            if self.places[number] == self.place
        }
        self.ahead = self.places[-1] == self.place
        self._schedule: _PipelineSchedule | None = None
        self._table: Tensor | None = None
        self._copy: Tensor | None = None
        # It reports a failure with all that every process had to do.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)

    def place_of(self, name: str) -> int:
        """Which place holds a parameter."""
        if name == _TABLE:
            return self.places[0]
        kind, number, *_ = name.split(".")
        stages = enumerate(self.layout.stages)
        stage = next(place for place, blocks in stages if int(number) in blocks) if kind == "layers" else -1
        return self.places[stage]

    # ------------------------------------------------------------------------------------------------- a step

    def backward(self, work: Step) -> Tensor:
        """`Step.backward`, of the losses of this process's stages."""
        self._begin()
        for stage in self.stages.values():
            stage.begin(work)
        if self._schedule is None:
            self._schedule = self._scheduled(work)
        # Stages have their micro-batches; torch wants something to cut up all the same.
        numbers = torch.arange(len(work.micro_batches))
        try:
            self._schedule.step(*([numbers] if 0 in self.stages else []), target=numbers, return_outputs=False)
        except RuntimeError as error:  # torch tells what it was at, and what went wrong only as the cause
            raise error.__cause__ or error from None
        return torch.stack([stage.sums for stage in self.stages.values()]).sum(dim=0)

    def _scheduled(self, work: Step) -> _PipelineSchedule:
        from torch.distributed.pipelining import PipelineStage, schedules

        ids, _ = work.micro_batches[0].inputs(self.model)
        dtype = self.model.compute_dtype or torch.float32
        nothing = torch.empty(1, dtype=torch.int64, device="meta")
        x = torch.empty(*ids.shape, self.model.config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        # Some schedules put gradients of weights off, which torch cannot for weights that a stage uses at several depths, as
        # the last one does head and embedding: there they are taken at once, and nothing is left to do.
        at_once = (lambda: lambda: None) if copies_embedding(self.model) else None
        stages = [
            PipelineStage(
                stage, number, len(self.places), self.device, input_args=nothing if stage.first else x,
                output_args=loss if stage.last else x, group=self.group, dw_builder=at_once if stage.last else None,
            )
            for number, stage in self.stages.items()
        ]  # fmt: skip
        kind = {
            "1f1b": schedules.Schedule1F1B, "interleaved": schedules.ScheduleInterleaved1F1B,
            "zbv": schedules.ScheduleZBVZeroBubble, "dualpipev": schedules.ScheduleDualPipeV,
        }[self.layout.schedule]  # fmt: skip
        own: Any = stages[0] if kind is schedules.Schedule1F1B else stages
        return kind(own, len(work.micro_batches), loss_fn=lambda loss, _: loss, scale_grads=False)

    @torch.no_grad()
    def survey(self, work: Step) -> None:
        """`Step.survey`, of the layers of this process's stages."""
        self._begin()
        for micro in work.micro_batches:
            work.balance.listen()
            ids, documents = micro.inputs(self.model)
            hidden = self._forward(ids, documents)
            if hidden is not None:
                for _ in further_hidden(self.stages[len(self.places) - 1], hidden, micro):
                    pass
            work.balance.survey(work.balance.hear(ids.shape[1]))

    def _forward(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> Tensor | None:
        """Through all stages, forward only. The last one's hidden states, if that is here."""
        x = ids_BT
        for number, stage in self.stages.items():
            before, after = (self.places[n] if 0 <= n < len(self.places) else self.place for n in (number - 1, number + 1))
            if before != self.place:
                dtype = self.model.compute_dtype or torch.float32
                x = torch.empty(*ids_BT.shape, self.model.config.hidden_size, dtype=dtype, device=self.device)
                self._receive(x, before)
            x = stage.hidden(x, document_BT=document_BT)
            if after != self.place:
                self._send(x, after)
        return x if self.ahead else None

    def _send(self, x: Tensor, place: int) -> None:
        if x.numel():
            dist.send(x.contiguous(), group=self.group, group_dst=place)

    def _receive(self, x: Tensor, place: int) -> None:
        if x.numel():
            dist.recv(x, group=self.group, group_src=place)

    # ------------------------------------------------------------------------------------------------- the second embedding

    def bind(self, parts: dict[str, Part]) -> None:
        """Take note, once the stages are cut up, of what this process holds of the embedding and of its copy."""
        if not copies_embedding(self.model):
            return
        if 0 in self.stages:
            self._table = parts[_TABLE].local
        if self.ahead:
            self._copy = self.stages[len(self.places) - 1].embed_tokens.weight

    @torch.no_grad()
    def _begin(self) -> None:
        """The copy takes the embedding's values."""
        for stage in self.stages.values():
            stage.compute_dtype = self.model.compute_dtype
        copy = None if self._copy is None else _local(self._copy)
        if self._table is not None and copy is not None:
            copy.copy_(self._table)
        elif self._table is not None:
            self._send(self._table, self.places[-1])
        elif copy is not None:
            self._receive(copy, self.places[0])

    @torch.no_grad()
    def hand_back(self) -> None:
        """The copy's gradient is added to the embedding's, which is the gradient of `bind`'s local tensor by now."""
        gradient = None
        if self._copy is not None:
            # No gradient: no sequence of the step has trained the modules.
            gradient = torch.zeros_like(_local(self._copy)) if self._copy.grad is None else _local(self._copy.grad)
            self._copy.grad = None
        if self._table is not None:
            assert self._table.grad is not None
            if gradient is None:
                gradient = torch.empty_like(self._table)
                self._receive(gradient, self.places[-1])
            self._table.grad += gradient
        elif gradient is not None:
            self._send(gradient, self.places[0])

    # ------------------------------------------------------------------------------------------------- evaluation

    def scored(self) -> Transformer:
        """What to score, where the last stage is."""
        self._begin()
        return _Ahead(self)

    @torch.inference_mode()
    def follow(self) -> None:
        """Where it is not: compute what is asked for until `done`."""
        self._begin()
        while (ids := self.ask(None)) is not None:
            self._forward(ids)
        self._rest()

    def done(self) -> None:
        self._call(-1, 0)
        self._rest()

    def ask(self, ids_BT: Tensor | None) -> Tensor | None:
        """The ids [B, T] that the process ahead, where they are given, wants passed through the stages; None for no more."""
        rows, columns = self._call(*(ids_BT.shape if ids_BT is not None else (0, 0)))
        if rows < 0:
            return None
        ids = torch.empty(rows, columns, dtype=torch.int64, device=self.device) if ids_BT is None else ids_BT.contiguous()
        if ids.numel():
            dist.broadcast(ids, group=self.group, group_src=self.places[-1])
        return ids

    def _call(self, rows: int, columns: int) -> tuple[int, int]:
        said = torch.tensor([rows, columns])
        dist.broadcast(said, group=self.group, group_src=self.places[-1])
        rows, columns = said.tolist()
        return rows, columns

    def _rest(self) -> None:
        """Let go of gathered weights, which the optimizer is about to change."""
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


class _Ahead(Transformer):
    """The model as the process of the last stage scores with it: the others compute what comes before."""

    def __init__(self, pipeline: Pipeline) -> None:
        nn.Module.__init__(self)
        self.config, self.pipeline = pipeline.model.config, pipeline
        self.lm_head = pipeline.stages[len(pipeline.places) - 1].lm_head

    def hidden(
        self, ids_BT: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None, own_T: Positions = EVERY
    ) -> Tensor:
        ids = self.pipeline.ask(ids_BT)
        assert ids is not None
        hidden = self.pipeline._forward(ids)
        assert hidden is not None
        return hidden


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
