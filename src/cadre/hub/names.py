"""Tensor names: those of Cadre's modules, and those on disk that every Hugging Face reader knows.

On disk every expert has its own matrices and a multi-token prediction module is one more layer; in memory the experts
of a layer are fused and the modules are apart. One table of pieces serves both directions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer

Shape = tuple[int, ...]
_Module = TypeVar("_Module", bound=nn.Module)

_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_MODULE = re.compile(r"mtp\.(\d+)\.(block\.)?(norm\.)?(.*)")


@dataclass(frozen=True)
class Piece:
    """One tensor on disk: its name and shape, and the part `state[name][index]` of the model that it is."""

    disk: str
    shape: Shape
    state: str
    index: tuple[int | slice, ...] = ()


def skeleton(config: ModelConfig) -> Transformer:
    """The model without storage, all parameters on torch's meta device."""
    with torch.device("meta"):
        return Transformer(config)


def give_storage(module: _Module, device: str | torch.device) -> _Module:
    """The tensors of a skeleton, or a part of it, on a device, of whatever values its memory has. `to_empty` is the same by way
    of a module of torch's that takes over half a second to import."""
    return module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def pieces(config: ModelConfig, model: Transformer) -> list[Piece]:
    """Every tensor that a model directory must hold, each once."""
    result: list[Piece] = []
    for state, tensor in model.state_dict().items():
        if state == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shape, disk = tuple(tensor.shape), disk_name(config, state)
        experts = _EXPERTS.fullmatch(disk)
        if experts is None:
            result.append(Piece(disk, shape, state))
            continue
        folder, part = experts.groups()
        gate, up, down = config.family.expert
        for expert in range(shape[0]):
            if part == "down_proj":
                result.append(Piece(f"{folder}.{expert}.{down}.weight", shape[1:], state, (expert,)))
                continue
            width = shape[1] // 2
            for half, name in enumerate((gate, up)):
                rows = slice(half * width, (half + 1) * width)
                result.append(Piece(f"{folder}.{expert}.{name}.weight", (width, shape[2]), state, (expert, rows)))
    return result


def fused_pieces(config: ModelConfig, model: Transformer) -> list[Piece]:
    """The other way to store experts: whole, under their in-memory names."""
    named = ((disk_name(config, state), state, tensor) for state, tensor in model.state_dict().items())
    return [Piece(disk, tuple(tensor.shape), state) for disk, state, tensor in named if _EXPERTS.fullmatch(disk)]


def disk_name(config: ModelConfig, state: str) -> str:
    """The name on disk of a tensor of the model; fused experts keep theirs within the layer."""
    module = _MODULE.fullmatch(state)
    if module is not None:
        depth, _, norm, rest = module.groups()
        return f"{module_prefix(config, int(depth))}{'shared_head.norm.' if norm else ''}{rest}"
    layer = config.family.layer
    return state if state == "lm_head.weight" else f"model.{state.replace('.mlp.', f'.{layer}.')}"


def module_prefix(config: ModelConfig, depth: int) -> str:
    """What the names of multi-token prediction module `depth` (from 0) begin with."""
    return f"model.layers.{config.num_hidden_layers + depth}."


def duplicates(config: ModelConfig) -> dict[str, str]:
    """Copies of embedding and head that the published layout keeps in every multi-token prediction module, with the
    model's tensor that each must equal."""
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    result = {}
    for depth in range(config.num_nextn_predict_layers):
        prefix = module_prefix(config, depth)
        result[f"{prefix}embed_tokens.weight"] = "embed_tokens.weight"
        result[f"{prefix}shared_head.head.weight"] = head
    return result


def hollow(config: ModelConfig) -> dict[str, Shape]:
    """Tensors without elements: transformers always builds shared experts where a family may have them, of width 0 where there
    are none, and reports them missing unless they are stored."""
    if not config.has_experts or config.n_shared_experts or not config.family.like_deepseek:
        return {}
    wide, tall = (0, config.hidden_size), (config.hidden_size, 0)
    shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": tall}
    layers = [layer for layer in range(config.total_layers) if config.is_sparse(layer)]
    return {f"model.layers.{n}.mlp.shared_experts.{part}.weight": shapes[part] for n in layers for part in shapes}
