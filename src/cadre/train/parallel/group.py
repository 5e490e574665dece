"""What the trainer needs of the processes of a run, as one object. `Parallel`, its plain form, is a single process;
`ranks.Ranks` is one of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cadre.data.shards import TokenData
from cadre.errors import UsageError
from cadre.hub.load import read_values
from cadre.hub.save import save
from cadre.hub.template import ChatTemplate
from cadre.model.config import ModelConfig
from cadre.model.scoring import Score, Text, score_documents
from cadre.model.transformer import EVERY, Positions, Transformer
from cadre.train.checkpoint import Tensors, load_checkpoint, model_tensors, save_checkpoint
from cadre.train.muon import Muon
from cadre.train.parallel.layout import compose, v_schedules
from cadre.train.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.train.objective import Step
    from cadre.train.optimizer import Optimizer


class Parallel:
    """A single process: it holds all parameters, and its values are the sums over all processes.

    rank, size: this process's number and how many there are. `main`: whether it is the one that prints, logs and writes files.
    """

    rank = 0
    size = 1
    # Whether the process that started this one has ended, so that nobody would notice what this one does.
    abandoned = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------------------------------------- setting up

    def require_same(self, recipe: Recipe) -> None:
        """Raise `RunError` in all processes if one of them was given another recipe than the main one; where the text lies may
        differ."""

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the `with` block in the main process first, then in the others, which find what it has prepared. If it fails,
        they end with an error."""
        yield

    def prepared(self, make: Callable[[], TokenData]) -> TokenData:
        """Token data: one process of each machine makes it, the others on that machine open it. Each checks for itself
        every file that it opens (two MiB of a shard). Raises what `make` raises."""
        return make()

    def check(self, recipe: Recipe, config: ModelConfig) -> None:
        """Set `layout` from the recipe. Raises `UsageError` if the layout does not fit."""
        self.layout = compose(recipe, config, self.size)
        if self.layout.v_shaped and not v_schedules():
            raise UsageError(
                f'parallel.schedule "{self.layout.schedule}" needs torch 2.13 or newer: choose "1f1b" or "interleaved"'
            )

    def build(self, config: ModelConfig, device: torch.device, seed: int | None, source: Path | None = None) -> Transformer:
        """This process's part of the model. Its values come from the model directory `source`, or are initialised from `seed`;
        with neither they are undefined, for a checkpoint to fill. Raises `UsageError` for a directory that is damaged or holds
        another model."""
        model = Transformer(config)
        if source is not None:
            state = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers()))
            with torch.no_grad():
                for name, value in read_values(source, torch.float32):
                    state[name].copy_(value)
        elif seed is not None:
            model.initialize(seed)
        return model.to(device)

    # ------------------------------------------------------------------------------------------------- a step

    @property
    def batch_part(self) -> tuple[int, int]:
        """Which part of each batch's sequences this process reads, and how many parts there are."""
        return self.rank % self.layout.data // self.layout.context, self.layout.readers

    def own(self, length: int) -> Positions:
        """Which positions this process computes of its sequences, which have so many."""
        return EVERY

    def add_shared(self, count: Tensor) -> Tensor:
        """The sum over the processes that compute positions of the same sequences as this one."""
        return count

    def collect_loads(self, model: Transformer, work: Step) -> None:
        """`Step.collect_loads`: forward passes without the head, for the global balance loss to see all micro-batches of a step
        before the first is trained."""
        work.collect_loads(model)

    def backward(self, model: Transformer, work: Step) -> Tensor:
        """`Step.backward`: add the gradients of a step's micro-batches, and return this process's share of the batch's
        losses."""
        return work.backward(model)

    def add(self, *tensors: Tensor) -> None:
        """All-reduce by sum, in place."""

    def most(self, tensor: Tensor) -> None:
        """All-reduce by maximum, in place."""

    def agree(self, value: float) -> float:
        """The main process's value."""
        return value

    def anyone(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    # ------------------------------------------------------------------------------------------------- the optimizer

    def held(self, model: Transformer) -> dict[str, Tensor]:
        """What this process holds of each parameter."""
        return dict(model.named_parameters())

    def held_rows(self, name: str) -> slice:
        """Which rows of a parameter `held` has."""
        return slice(None)

    def hand_over_gradients(self) -> None:
        """Give the tensors of `held` the gradients of their parameters."""

    def drop_gradients(self) -> None:
        """Forget the gradients of the parameters."""

    def norm(self, norm: Tensor) -> Tensor:
        """The norm over the parameters of all processes, from the norm over this process's."""
        return norm

    def muon(self, matrices: Iterable[Any], **options: Any) -> Muon:
        return Muon(matrices, **options)

    # ------------------------------------------------------------------------------------------------- the disk

    def tensors(self, model: Transformer, optimizer: Optimizer) -> Tensors:
        """What a checkpoint holds, as it is now; a tensor of which this process has a part is a DTensor."""
        return Tensors(model_tensors(model), optimizer.tensors())

    def save_checkpoint(self, run_dir: Path, tensors: Tensors, copies: Tensors, state: dict[str, Any], keep: int) -> None:
        """Write `copies`, this process's own of what `tensors` describes; together, and beside the training."""
        save_checkpoint(run_dir, copies, state, keep)

    def load_checkpoint(self, path: Path, model: Transformer, optimizer: Optimizer) -> None:
        load_checkpoint(path, model, optimizer)

    def save_model(
        self, model: Transformer, weights: dict[str, Tensor], path: Path, tokenizer: Tokenizer, dtype: torch.dtype,
        like: Path | None = None, chat_template: ChatTemplate | None = None,
    ) -> None:  # fmt: skip
        """`cadre.save` of a model with these `weights`, of which this process has its part. All processes must call it;
        training may go on meanwhile."""
        save(
            model,
            path,
            tokenizer,
            dtype=dtype,
            fetch=lambda name, index: weights[name][index],
            like=like,
            chat_template=chat_template,
        )

    # ------------------------------------------------------------------------------------------------- evaluation

    def score(self, model: Transformer, tokenizer: Tokenizer, documents: Iterable[Text], *, context: int, stride: int) -> Score:
        """`score_documents`, of which each process scores its share."""
        return score_documents(model, tokenizer, documents, context=context, stride=stride)
