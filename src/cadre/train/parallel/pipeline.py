"""Pipeline parallelism: the model's blocks are split into stages, and every micro-batch goes through all stages in turn.

A process holds only its own stages. Of the other stages it has the router biases, which all processes update alike, and the
other tensors on the meta device. A schedule says which stage computes which micro-batch when; the schedules are torch's: 1F1B
(arXiv 2006.09503), interleaved (arXiv 2104.04473, section 2.2), ZB-V (arXiv 2401.10241, section 6), DualPipeV (after arXiv
2412.19437, section 3.2.1).

Each stage sends hidden states to the next one and their gradients to the one before. It adds the balance losses of its own
layers to the gradient. Losses and loads are summed over all processes, as without a pipeline.

The last stage needs the embedding too, for multi-token prediction and for a head that is tied to it. It has a copy, which takes
the embedding's values at the start of every step; the copy's gradient is sent to the first stage, which trains the embedding.

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
from cadre.train.objective import Step, mtp_hidden
from cadre.train.parallel.layout import Layout
from cadre.train.parallel.stage import Stage, copies_embedding

if TYPE_CHECKING:
    from torch.distributed.pipelining.schedules import _PipelineSchedule

    from cadre.train.parallel.shard import Part

_EMBEDDING = "embed_tokens.weight"


class Pipeline:
    """This process's stages, by number, and passes through all stages. `rank`: of this process. `wait`: how long it waits for
    other processes. All processes must call the same methods in the same order, but for an evaluation: processes that hold the
    last stage (`has_last_stage`) call `scoring_model` and `end_scoring`, and the others call `serve_scoring` meanwhile."""

    def __init__(self, model: Transformer, layout: Layout, rank: int, device: torch.device, wait: timedelta) -> None:
        self.model, self.layout, self.device = model, layout, device
        self.places = layout.places
        ranks = torch.arange(layout.pipeline * layout.data).view(layout.pipeline, layout.data)
        # The ranks that compute the same sequences, one of each place; and the ranks of this place, which hold the same stages.
        self.group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=wait)
        self.same_stages, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=wait)
        self.place = rank // layout.data
        self.stages = {
            number: Stage(model, blocks, device)
            for number, blocks in enumerate(layout.stages)
            if self.places[number] == self.place
        }
        self.has_last_stage = self.places[-1] == self.place
        self._schedule: _PipelineSchedule | None = None
        self._embedding: Tensor | None = None
        self._copy: Tensor | None = None
        # torch would log the whole schedule of every rank with each failure.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)

    def place_of(self, name: str) -> int:
        """The place in the pipeline that holds a parameter, by the parameter's name."""
        if name == _EMBEDDING:
            return self.places[0]
        kind, number, *_ = name.split(".")
        stages = enumerate(self.layout.stages)
        stage = next(place for place, blocks in stages if int(number) in blocks) if kind == "layers" else -1
        return self.places[stage]

    # ------------------------------------------------------------------------------------------------- a step

    def backward(self, work: Step) -> Tensor:
        """`Step.backward` for the losses of this process's stages."""
        self._begin()
        for stage in self.stages.values():
            stage.begin(work)
        if self._schedule is None:
            self._schedule = self._scheduled(work)
        # The stages take their micro-batches from `work`; torch only splits this tensor into as many parts.
        numbers = torch.arange(len(work.micro_batches))
        try:
            self._schedule.step(*([numbers] if 0 in self.stages else []), target=numbers, return_outputs=False)
        except RuntimeError as error:  # torch says only where it failed; the cause says why
            raise error.__cause__ or error from None
        return torch.stack([stage.sums for stage in self.stages.values()]).sum(dim=0)

    def _scheduled(self, work: Step) -> _PipelineSchedule:
        from torch.distributed.pipelining import PipelineStage, schedules

        ids, _ = work.micro_batches[0].inputs(self.model)
        dtype = self.model.compute_dtype or torch.float32
        nothing = torch.empty(1, dtype=torch.int64, device="meta")
        x = torch.empty(*ids.shape, self.model.config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        # Some schedules compute gradients of weights later than those of inputs. torch cannot do that for weights that a stage
        # uses more than once, as the last stage uses head and embedding: it computes both at once, and later does nothing.
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
    def collect_loads(self, work: Step) -> None:
        """`Step.collect_loads` for the layers of this process's stages."""
        self._begin()
        for micro in work.micro_batches:
            work.balance.record()
            ids, documents = micro.inputs(self.model)
            hidden = self._forward(ids, documents)
            if hidden is not None:
                for _ in mtp_hidden(self.stages[len(self.places) - 1], hidden, micro):
                    pass
            work.balance.collect_loads(work.balance.recorded(ids.shape[1]))

    def _forward(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> Tensor | None:
        """A forward pass through all stages. Returns the hidden states of the last one where that is on this process."""
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
        return x if self.has_last_stage else None

    def _send(self, x: Tensor, place: int) -> None:
        if x.numel():
            dist.send(x.contiguous(), group=self.group, group_dst=place)

    def _receive(self, x: Tensor, place: int) -> None:
        if x.numel():
            dist.recv(x, group=self.group, group_src=place)

    # ------------------------------------------------------------------------------------------------- the second embedding

    def bind(self, parts: dict[str, Part]) -> None:
        """Keep what this process holds of the embedding and of its copy, once the stages have been sharded."""
        if not copies_embedding(self.model):
            return
        if 0 in self.stages:
            self._embedding = parts[_EMBEDDING].local
        if self.has_last_stage:
            self._copy = self.stages[len(self.places) - 1].embed_tokens.weight

    @torch.no_grad()
    def _begin(self) -> None:
        """Set the compute dtype of the stages, and send the embedding's values to its copy."""
        for stage in self.stages.values():
            stage.compute_dtype = self.model.compute_dtype
        copy = None if self._copy is None else _local(self._copy)
        if self._embedding is not None and copy is not None:
            copy.copy_(self._embedding)
        elif self._embedding is not None:
            self._send(self._embedding, self.places[-1])
        elif copy is not None:
            self._receive(copy, self.places[0])

    @torch.no_grad()
    def add_copy_gradient(self) -> None:
        """Add the gradient of the embedding's copy to that of the embedding, which `Part.local` must have by now."""
        gradient = None
        if self._copy is not None:
            # There is none if no sequence of the step has trained the multi-token prediction modules.
            gradient = torch.zeros_like(_local(self._copy)) if self._copy.grad is None else _local(self._copy.grad)
            self._copy.grad = None
        if self._embedding is not None:
            assert self._embedding.grad is not None
            if gradient is None:
                gradient = torch.empty_like(self._embedding)
                self._receive(gradient, self.places[-1])
            self._embedding.grad += gradient
        elif gradient is not None:
            self._send(gradient, self.places[0])

    # ------------------------------------------------------------------------------------------------- evaluation

    def scoring_model(self) -> Transformer:
        """The model to score with, on a process that holds the last stage."""
        self._begin()
        return _ScoringModel(self)

    @torch.inference_mode()
    def serve_scoring(self) -> None:
        """On all other processes: compute their stages of every pass until `end_scoring` is called."""
        self._begin()
        while (ids := self.broadcast_ids(None)) is not None:
            self._forward(ids)
        self._reshard()

    def end_scoring(self) -> None:
        self._broadcast_shape(-1, 0)
        self._reshard()

    def broadcast_ids(self, ids_BT: Tensor | None) -> Tensor | None:
        """The ids [B, T] of the next pass, which the process with the last stage gives and the others get; None after the last
        pass."""
        rows, columns = self._broadcast_shape(*(ids_BT.shape if ids_BT is not None else (0, 0)))
        if rows < 0:
            return None
        ids = torch.empty(rows, columns, dtype=torch.int64, device=self.device) if ids_BT is None else ids_BT.contiguous()
        if ids.numel():
            dist.broadcast(ids, group=self.group, group_src=self.places[-1])
        return ids

    def _broadcast_shape(self, rows: int, columns: int) -> tuple[int, int]:
        shape = torch.tensor([rows, columns])
        dist.broadcast(shape, group=self.group, group_src=self.places[-1])
        rows, columns = shape.tolist()
        return rows, columns

    def _reshard(self) -> None:
        """Free the weights that FSDP has gathered, for the optimizer is about to change them."""
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


class _ScoringModel(Transformer):
    """The whole model, for scoring on a process with the last stage: the other processes compute the stages before."""

    def __init__(self, pipeline: Pipeline) -> None:
        nn.Module.__init__(self)
        self.config, self.pipeline = pipeline.model.config, pipeline
        self.lm_head = pipeline.stages[len(pipeline.places) - 1].lm_head

    def hidden(
        self, ids_BT: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None, own_T: Positions = EVERY
    ) -> Tensor:
        ids = self.pipeline.broadcast_ids(ids_BT)
        assert ids is not None
        hidden = self.pipeline._forward(ids)
        assert hidden is not None
        return hidden


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
