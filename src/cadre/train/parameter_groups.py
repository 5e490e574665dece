"""What every optimizer here is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class ParameterGroups(ABC):
    """Parameters in groups of shared settings, and the state of each, as `torch.optim.Optimizer` has them. Building one of
    those imports torch's compiler, which took a sixth of a short run's seconds (docs/log.md) and is not used.

    `groups`: each a dict of "params" and of what it sets otherwise than `defaults`."""

    def __init__(self, groups: Iterable[dict[str, Any]], **defaults: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [{**defaults, **group, "params": list(group["params"])} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @abstractmethod
    def step(self) -> None:
        """Update the parameters by their gradients; those that have none stay as they are."""

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
