"""The processes of a run, as the trainer sees them: one object, whose plain form is a process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cadre.data.shards import TokenData
from cadre.errors import UsageError
from cadre.hub.load import read_values
from cadre.hub.save import save
from cadre.model.config import ModelConfig
from cadre.model.scoring import Score, Text, score_documents
from cadre.model.transformer import EVERY, Positions, Transformer
from cadre.train.checkpoint import Tensors, load_checkpoint, model_tensors, save_checkpoint
from cadre.train.muon import Muon
from cadre.train.parallel.layout import compose, v_schedules
from cadre.train.recipe import Recipe

if TYPE_CHECKING:
    from cadre.train.objective import Step
    from cadre.train.optimizer import Optimizer


class Parallel:
    """A process alone: everything is where it belongs, and sums are what they are.

    rank, size: this process among all of the run. `main`: whether it is the one that prints, logs and keeps the books.
    """

    rank = 0
    size = 1
    # Whether whoever started this process is gone, so that it would go on unseen.
    abandoned = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------------------------------------- setting up

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The main process first and alone, then the others, which find what it has prepared; if it fails they end."""
        yield

    def prepared(self, make: Callable[[], TokenData]) -> TokenData:
        """Token data that one process of each machine makes, and the others there open. Raises what `make` raises."""
        return make()

    def check(self, recipe: Recipe, config: ModelConfig) -> None:
        """Put the recipe's layout together. Raises `UsageError` for one that does not fit."""
        self.layout = compose(recipe, config, self.size)
        if self.layout.goes_back and not v_schedules():
            raise UsageError(
                f'parallel.schedule "{self.layout.schedule}" needs torch 2.13 or newer: choose "1f1b" or "interleaved"'
            )

    def build(self, config: ModelConfig, device: torch.device, seed: int | None, source: Path | None = None) -> Transformer:
        """This process's part of the model: of a directory, or initialised from a seed, or, with neither, to be filled from
        a checkpoint. Raises `UsageError` for a directory that holds another model or a damaged one."""
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
    def part(self) -> tuple[int, int]:
        """Which part of each batch's sequences this process reads, of how many."""
        return self.rank % self.layout.data // self.layout.context, self.layout.readers

    def own(self, length: int) -> Positions:
        """Which positions of its sequences, of so many, this process computes."""
        return EVERY

    def add_shared(self, count: Tensor) -> Tensor:
        """The sum over the processes that share this one's sequences."""
        return count

    def survey(self, model: Transformer, work: Step) -> None:
        """Let the global balance loss see a step's micro-batches before the first one is trained: forward passes, no head."""
        work.survey(model)

    def backward(self, model: Transformer, work: Step) -> Tensor:
        """Add the gradients of a step's micro-batches. Returns this process's part of the batch's losses, `Step.backward`."""
        return work.backward(model)

    def share(self, whole: Sequence[Any]) -> Sequence[Any]:
        """This process's part of what is done once for the whole run."""
        return whole[self.rank :: self.size]

    def add(self, *tensors: Tensor) -> None:
        """Replace each by its sum over all processes."""

    def most(self, tensor: Tensor) -> None:
        """Replace it by its largest over all processes, element by element."""

    def agree(self, value: float) -> float:
        """The main process's value."""
        return value

    def anyone(self, flag: bool) -> bool:
        """Whether it holds of any process."""
        return flag

    # ------------------------------------------------------------------------------------------------- the optimizer

    def held(self, model: Transformer) -> dict[str, Tensor]:
        """What this process holds of each parameter."""
        return dict(model.named_parameters())

    def held_rows(self, name: str) -> slice:
        """Which of a parameter's rows `held` has."""
        return slice(None)

    def hand_over_gradients(self) -> None:
        """Give the tensors of `held` the gradients of their parameters."""

    def drop_gradients(self) -> None:
        """Forget the gradients of the parameters."""

    def norm(self, norm: Tensor) -> Tensor:
        """The norm over all processes, from this one's."""
        return norm

    def muon(self, matrices: Iterable[Any], **options: Any) -> Muon:
        return Muon(matrices, **options)

    # ------------------------------------------------------------------------------------------------- the disk

    def tensors(self, model: Transformer, optimizer: Optimizer) -> Tensors:
        """What a checkpoint holds, as it is now; a part of a whole as a DTensor."""
        return Tensors(model_tensors(model), optimizer.tensors())

    def save_checkpoint(self, run_dir: Path, tensors: Tensors, copies: Tensors, state: dict[str, Any], keep: int) -> None:
        """Write `copies`, this process's own of what `tensors` describes; together, and beside the training."""
        save_checkpoint(run_dir, copies, state, keep)

    def load_checkpoint(self, path: Path, model: Transformer, optimizer: Optimizer) -> None:
        load_checkpoint(path, model, optimizer)

    def save_model(
        self, model: Transformer, weights: dict[str, Tensor], path: Path, tokenizer: Any, dtype: torch.dtype,
        like: Path | None = None,
    ) -> None:  # fmt: skip
        """`cadre.save` with such `weights`, of which this process has its part; together, and beside the training."""
        save(model, path, tokenizer, dtype=dtype, fetch=lambda name, index: weights[name][index], like=like)

    # ------------------------------------------------------------------------------------------------- evaluation

    def score(self, model: Transformer, tokenizer: Any, documents: Sequence[Text], *, context: int, stride: int) -> Score:
        """`score_documents`, each process on its share."""
        return score_documents(model, tokenizer, documents, context=context, stride=stride)
