"""Saving beside the training: it waits for a copy of what it is about to change, not for the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cadre.kernels.memory import free_bytes
from cadre.train.checkpoint import Tensors


class Saver:
    """Writes copies of a run's tensors in a thread, one checkpoint at a time.

    The copies lie in host memory (pinned, of an accelerator's tensors) and take as much of it as what this process holds of
    weights and optimizer state; `prepare` makes them, else the first save, and every save uses them. `note` hears once
    that they do not fit: the training then waits for the disk. `anyone`: whether something holds of any process of the run.
    """

    def __init__(self, note: Callable[[str], None], anyone: Callable[[bool], bool] = bool) -> None:
        self._note, self._anyone = note, anyone
        self._copies: dict[str, Tensor] = {}
        self._told = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, tensors: Tensors) -> None:
        """Make the copies before they are wanted. A page of memory costs far more when it is touched first than ever after, and
        a run that they do not leave room for should not learn that at its first checkpoint. Waits for a save under way, which
        writes from them."""
        self.wait()
        here = {**local(tensors.weights), **local(tensors.moments)}
        if not self._anyone(not self._fits(here)):
            self._copied(here)

    def save(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """Have `write` called with a copy of this process's part of each tensor, as it is now. Waits for the save before, and
        raises what that raised."""
        self.wait()
        here = Tensors(local(tensors.weights), local(tensors.moments))
        if self._anyone(not self._fits({**here.weights, **here.moments})):
            write(here)
            return
        copies = Tensors(self._copied(here.weights), self._copied(here.moments))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # Of a process that ends for another reason the thread must not delay the end.
        self._thread = threading.Thread(target=self._work, args=(write, copies), name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the last save raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed, which `wait` would raise."""
        return self._error is not None

    def _work(self, write: Callable[[Tensors], None], copies: Tensors) -> None:
        try:
            write(copies)
        except BaseException as error:  # whatever it is, the training has to hear of it
            self._error = error

    def _fits(self, tensors: dict[str, Tensor]) -> bool:
        wanted = sum(tensor.nbytes for name, tensor in tensors.items() if name not in self._copies)
        wanted *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the others of this machine want as much, at the same time
        if wanted <= free_bytes(torch.device("cpu")):
            return True
        if not self._told:
            self._note(f"no room for a copy of {wanted / 2**30:.1f} GiB: the training waits while a checkpoint is written")
        self._told = True
        return False

    @torch.no_grad()
    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(
                    tensor, device="cpu", memory_format=torch.contiguous_format, pin_memory=tensor.is_cuda
                )
        copies = {name: self._copies[name] for name in tensors}
        if copies:
            torch._foreach_copy_(list(copies.values()), list(tensors.values()), non_blocking=True)
        return copies


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of each. DTensors are told by what they can: their module takes a second to import."""
    return {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach() for name, tensor in tensors.items()}
