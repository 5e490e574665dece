"""A run of several processes, on torch.distributed: gloo between CPU processes, NCCL between accelerators."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from cadre.data.shards import TokenData
from cadre.errors import RunError, UsageError, write_error
from cadre.hub.load import read_values
from cadre.hub.names import skeleton
from cadre.hub.save import save
from cadre.hub.template import ChatTemplate
from cadre.model.config import ModelConfig
from cadre.model.scoring import Score, Text, score_each
from cadre.model.transformer import Positions, Transformer
from cadre.train.checkpoint import Tensors
from cadre.train.muon import Muon
from cadre.train.parallel.checkpoint import load_parts, save_parts
from cadre.train.parallel.context import ContextGroup, use_context_parallel_attention
from cadre.train.parallel.gather import GatherToMain
from cadre.train.parallel.group import Parallel
from cadre.train.parallel.muon import ShardedMuon
from cadre.train.parallel.pipeline import Pipeline
from cadre.train.parallel.shard import Part, open_shared_memory, remote_part, shard
from cadre.train.parallel.shared_memory import SharedMemory
from cadre.train.parallel.turns import Turns

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.train.objective import Step
    from cadre.train.optimizer import Optimizer
    from cadre.train.recipe import Recipe

# What a recipe may say otherwise on each machine: its name, and where files lie. (Text and tokenizer are compared themselves.)
_PLACES: Any = {"name": True, "data": {"source", "tokenizer"}, "model": {"from"}}


class Ranks(Parallel):
    """One of several processes. `timeout`: how many minutes it waits for the others before it gives up.

    Methods that communicate must be called by all processes, in the same order.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        self.wait = wait = timedelta(minutes=timeout)
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=wait))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The elastic agent keeps its store over a restart, and with it the addresses of processes that have ended. The
            # count of restarts sets them apart. (Several agents count separately; then torchrun must not share its store with
            # the processes, see `launch.without_restarts`.)
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=wait)
        self.device = device
        # For what is written to disk; once training has begun, only the thread that writes uses it.
        self.disk_group = dist.new_group(timeout=wait, backend="gloo")
        self.turns, self.turn = Turns(store, wait), 0
        # In the main process: the first rank of each machine, which prepares the token data there.
        self.preparing: set[int] = set()
        self.parent = os.getppid()
        self.parts: dict[str, Part] = {}
        self.elsewhere: dict[str, Part] = {}
        self.shared: SharedMemory | None = None
        self.shared_by_all: SharedMemory | None = None  # `shared`, if all processes share it
        self.context: ContextGroup | None = None
        self.pipeline: Pipeline | None = None

    @property
    def abandoned(self) -> bool:  # type: ignore[override]
        return os.getppid() != self.parent

    def close(self) -> None:
        dist.destroy_process_group()

    # ------------------------------------------------------------------------------------------------- setting up

    def require_same(self, recipe: Recipe) -> None:
        own = {f"{section}.{key}": value for section, values in recipe.model_dump(exclude=_PLACES).items()
               for key, value in values.items()}  # fmt: skip
        mains = [own]
        dist.broadcast_object_list(mains, 0, group=self.disk_group)

        def compare() -> None:
            for key in sorted({*own, *mains[0]}):
                if (here := own.get(key)) != (there := mains[0].get(key)):
                    raise RunError(f"rank {self.rank} was given {key} = {here}, and rank 0 {there}: give all the same recipe")

        self.together(compare)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        self.turn += 1
        name, self.preparing = f"turn {self.turn}", set()
        self.first = self.rank - int(os.environ.get("LOCAL_RANK", self.rank))  # of this machine
        self.turns.store.set(f"first of rank {self.rank}", str(self.first))
        if self.main:
            with self.turns.working(name):
                yield
            # The collectives that follow wait no longer than torch's time-out, and other machines may still be preparing.
            with self.turns.working(f"{name} everywhere"):
                for first in sorted(self.preparing):
                    self.turns.wait(f"text {self.turn} of rank {first}", first)
        else:
            self.turns.wait(name, 0)
            yield
            self.turns.wait(f"{name} everywhere", 0)

    def prepared(self, make: Callable[[], TokenData]) -> TokenData:
        first, name = self.first, f"text {self.turn} of rank"
        if self.main:
            self.preparing = {int(self.turns.store.get(f"first of rank {rank}")) for rank in range(self.size)}
        if self.rank != first:
            return TokenData.open(json.loads(self.turns.wait(f"{name} {first}", first))["path"])
        with self.turns.working(f"{name} {first}") as say:
            data = make()
            text = data.manifest["inputs"]
            if not self.main and (other := json.loads(self.turns.wait(f"{name} 0", 0))["text"]) != text:
                raise UsageError(f"rank {first} reads another text, or with another tokenizer, than rank 0 ({text}; {other})")
            say(json.dumps({"path": str(data.path), "text": text}))
        return data

    def together(self, work: Callable[[], None]) -> None:
        """Call `work` in all processes. If it fails in any of them, all raise an error that names the rank and the cause."""
        error: RunError | None = None
        unforeseen: Exception | None = None
        try:
            work()
        except (OSError, SafetensorError) as caught:
            error = write_error(f"rank {self.rank}", caught)
        except RunError as caught:
            error = caught
        except UsageError as caught:
            error = RunError(str(caught))
        except Exception as caught:  # such as out of memory: the others must not wait for this process
            unforeseen, error = caught, RunError(f"rank {self.rank}: {type(caught).__name__}: {caught}")
        told: list[tuple[type[RunError], str] | None] = [None] * self.size
        dist.all_gather_object(told, None if error is None else (type(error), str(error)), group=self.disk_group)
        if unforeseen is not None:
            raise unforeseen
        for kind, message in filter(None, told):
            raise kind(message)

    def build(self, config: ModelConfig, device: torch.device, seed: int | None, source: Path | None = None) -> Transformer:
        model, like = skeleton(config), skeleton(config)
        values: Iterable[tuple[str, Tensor]]
        if source is not None:
            values = read_values(source, torch.float32)
        elif seed is not None:
            values = like.initial_values(seed)
        else:
            values = ((name, torch.empty_like(tensor, device="cpu")) for name, tensor in like.state_dict().items())
        self.context, self.pipeline, self.elsewhere = None, None, {}
        if self.layout.context > 1:
            self.context = ContextGroup(dist.new_subgroups(self.layout.context, timeout=self.wait)[0])
            use_context_parallel_attention(model, self.context)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        meshes = [self.layout.meshes(device, place) for place in range(self.layout.pipeline)]
        for mesh in (part for pair in meshes for part in pair):
            for group in mesh.get_all_groups() if mesh.get_coordinate() is not None else []:
                _set_pg_timeout(self.wait, group)
        self.data_mesh, self.expert_mesh = meshes[self.rank // self.layout.data]
        self.shared = open_shared_memory(model, self.data_mesh.get_group("shard"), device, self.wait)
        self.shared_by_all = self.shared if self.data_mesh.get_group("shard").size() == self.size else None
        if self.layout.pipeline > 1:
            self.pipeline = Pipeline(model, self.layout, self.rank, device, self.wait)
        stages = [] if self.pipeline is None else list(self.pipeline.stages.values())
        self.parts = shard(
            model, values, self.data_mesh, self.expert_mesh, device, self.wait, stages, self.layout.fp8_rows, self.shared
        )
        if self.pipeline is not None:
            self.pipeline.bind(self.parts)
            self.elsewhere = {
                name: remote_part(name, shape, *meshes[self.pipeline.place_of(name)])
                for name, shape in shapes.items()
                if name not in self.parts
            }
        return model

    # ------------------------------------------------------------------------------------------------- a step

    def own(self, length: int) -> Positions:
        return super().own(length) if self.context is None else self.context.own(length, self.device)

    def add_shared(self, count: Tensor) -> Tensor:
        return count if self.context is None else self.context.all_reduce(count)

    def collect_loads(self, model: Transformer, work: Step) -> None:
        if self.pipeline is None:
            super().collect_loads(model, work)
        else:
            self.pipeline.collect_loads(work)

    def backward(self, model: Transformer, work: Step) -> Tensor:
        if self.pipeline is not None:
            return self.pipeline.backward(work)
        if self.layout.replicas == 1:
            return super().backward(model, work)
        # Replicas all-reduce their gradients after the last micro-batch, or after each if not all train the same parameters.
        alike = len({micro.joined for micro in work.micro_batches}) == 1
        sums: list[Tensor] = []
        for micro in work.micro_batches:
            model.set_requires_all_reduce(not alike or micro is work.micro_batches[-1])  # type: ignore[operator]
            sums.append(replace(work, micro_batches=[micro]).backward(model))
        return torch.stack(sums).sum(dim=0)

    def add(self, *tensors: Tensor) -> None:
        # One message for all tensors; float64 is exact for counts, which stay far below 2^53.
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        flat = self._sum(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def most(self, tensor: Tensor) -> None:
        if self.shared_by_all is None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return
        gathered = tensor.new_empty(self.size, *tensor.shape)
        self.shared_by_all.all_gather(gathered, tensor)
        torch.amax(gathered, dim=0, out=tensor)

    def agree(self, value: float) -> float:
        return float(self._sum(torch.tensor([value if self.main else 0.0], dtype=torch.float64)))

    def anyone(self, flag: bool) -> bool:
        return bool(self._sum(torch.tensor([float(flag)])))

    def _sum(self, mine: Tensor) -> Tensor:
        """The sum [N] over all processes, bit by bit the same in all of them."""
        if self.shared_by_all is None:
            dist.all_reduce(mine)
            return mine
        gathered = mine.new_empty(self.size, len(mine))
        self.shared_by_all.all_gather(gathered, mine)
        return gathered.sum(dim=0)

    # ------------------------------------------------------------------------------------------------- the optimizer

    def held(self, model: Transformer) -> dict[str, Tensor]:
        return {name: part.local for name, part in self.parts.items()}

    def held_rows(self, name: str) -> slice:
        return self.parts[name].rows(self.rank)

    def hand_over_gradients(self) -> None:
        for part in self.parts.values():
            gradient = part.parameter.grad
            part.local.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if self.pipeline is not None:
            self.pipeline.add_copy_gradient()

    def drop_gradients(self) -> None:
        for part in self.parts.values():
            part.parameter.grad = None

    def norm(self, norm: Tensor) -> Tensor:
        # Replicas hold the same gradients. Their squares are summed all the same, so that the norm is equal to the last bit.
        square = self._sum(norm.double().square().view(1))[0]
        return (square / self.layout.replicas).sqrt().to(norm.dtype)

    def muon(self, matrices: Iterable[Any], **options: Any) -> Muon:
        rows = {part.local: part.shape[0] for part in self.parts.values() if len(part.shape) == 2}
        return ShardedMuon(matrices, rows, self.data_mesh.get_group("shard"), self.shared, **options)

    # ------------------------------------------------------------------------------------------------- the disk

    def tensors(self, model: Transformer, optimizer: Optimizer) -> Tensors:
        moments = {name: self._part(name, tensor) for name, tensor in optimizer.tensors().items()}
        return Tensors(self._weights(model), moments)

    def save_checkpoint(self, run_dir: Path, tensors: Tensors, copies: Tensors, state: dict[str, Any], keep: int) -> None:
        save_parts(self, run_dir, {**tensors.weights, **tensors.moments}, {**copies.weights, **copies.moments}, state, keep)

    def load_checkpoint(self, path: Path, model: Transformer, optimizer: Optimizer) -> None:
        load_parts(path, self._weights(model), optimizer, self._part, self.disk_group, self.elsewhere.keys())

    def save_model(
        self, model: Transformer, weights: dict[str, Tensor], path: Path, tokenizer: Tokenizer, dtype: torch.dtype,
        like: Path | None = None, chat_template: ChatTemplate | None = None,
    ) -> None:  # fmt: skip
        parts = {name: replace(part, local=weights[name]) for name, part in self.parts.items()}
        kept = {name: weights[name] for name in weights.keys() - parts.keys()}
        gather = GatherToMain({**parts, **self.elsewhere}, kept, dtype, self.disk_group)
        if not self.main:
            gather.serve()

        def write() -> None:
            with gather:
                save(model, path, tokenizer, dtype=dtype, fetch=gather.fetch, like=like, chat_template=chat_template)

        self.together(write if self.main else lambda: None)

    def _weights(self, model: Transformer) -> dict[str, Tensor]:
        """By name: this process's parts of the parameters as DTensors, and the router biases whole."""
        return {**{name: part.as_dtensor(part.local) for name, part in self.parts.items()}, **dict(model.named_buffers())}

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the optimizer's state as a DTensor; a step count, which is not sharded, as it is."""
        return self.parts[name.rpartition(".")[0]].as_dtensor(tensor) if tensor.ndim else tensor

    # ------------------------------------------------------------------------------------------------- evaluation

    def score(self, model: Transformer, tokenizer: Tokenizer, documents: Iterable[Text], *, context: int, stride: int) -> Score:
        """Processes may have different numbers of passes to make, but every forward pass needs all of them: those that have
        finished make empty passes until all have."""
        total = Score(0.0, 0, 0)
        if self.pipeline is not None and not self.pipeline.has_last_stage:
            self.pipeline.serve_scoring()
        else:
            data = self.layout.data
            mine = islice(documents, self.rank % data, None, data)
            scored = model if self.pipeline is None else self.pipeline.scoring_model()
            scores = score_each(scored, tokenizer, mine, context=context, stride=stride, progress=self._still_scoring)
            total = sum(scores, total)
            nothing = torch.zeros(0, context, dtype=torch.int64, device=self.device)
            with torch.inference_mode():
                scored.hidden(nothing)  # for the others' pass that follows their last `_still_scoring`
                while self._any_scores(False):
                    scored.hidden(nothing)
            if self.pipeline is not None:
                self.pipeline.end_scoring()
        sums = self._sum(torch.tensor([total.nats, total.tokens, total.bytes], dtype=torch.float64))
        return Score(float(sums[0]), int(sums[1]), int(sums[2]))

    def _still_scoring(self, tokens: int) -> None:
        self._any_scores(True)

    def _any_scores(self, flag: bool) -> bool:
        if self.pipeline is None:
            return self.anyone(flag)
        scoring = torch.tensor([float(flag)])
        dist.all_reduce(scoring, group=self.pipeline.same_stages)
        return bool(scoring)
