"""How well a model predicts text: bits per byte, the measure that does not depend on the tokenizer.

Letters in names: B window, T position, N scored position, D hidden, W vocabulary (words).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
