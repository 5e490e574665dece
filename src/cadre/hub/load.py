"""Reading models in the Hugging Face layout, whoever wrote them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cadre.errors import UsageError
from cadre.files import kind_of, read_json_object
from cadre.hub.directory import (
    Stored,
    config_with_eos,
    load_config,
    model_directory,
    modules_stored,
    stored_tensors,
    without_absent_modules,
)
from cadre.hub.fp8 import SCALE_SUFFIX, check_quantization, dequantize, scale_shape
from cadre.hub.names import Piece, disk_name, duplicates, fused_pieces, give_storage, hollow, pieces, skeleton
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FP8 = "F8_E4M3"
# What a stored dtype becomes in memory.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    _FP8: torch.bfloat16,
}
_CORRECTION_BIAS = "e_score_correction_bias"


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    each: Callable[[nn.Module], nn.Module] | None = None,
) -> tuple[Transformer, Tokenizer | None]:
    """Read a model directory of a family in `cadre.model.families`, or the model of a run directory, in eval mode.

    `dtype` defaults to the stored one (of a mixture, the one config.json names or the commonest by bytes; FP8 blocks
    become bfloat16); the router's correction bias is float32 whatever it says. Tensors go from the files straight into
    the parameters, so beside the model there is never more than one of them. `each`: what takes the place of a module once it
    has its weights, before those of the next are read (`cadre.infer.quantize.load_quantized`). The tokenizer is None where the
    directory has no tokenizer.json.

    Raises `UsageError`, before any weight is read where headers tell: no model directory, pickle files, damaged or
    missing files, tensors that are missing, unexpected or of the wrong shape, a quantization Cadre cannot undo, numbers
    too large for float16 where `dtype` is that, and a tokenizer with more ids than the model has embeddings.
    """
    directory = model_directory(path)
    config = config_with_eos(directory)
    raw = read_json_object(directory / "config.json")
    check_quantization(raw, str(directory / "config.json"))
    stored = stored_tensors(directory)
    config = without_absent_modules(config, stored)
    tokenizer = load_tokenizer_of(directory, config)
    model = skeleton(config)
    plan = _plan(directory, config, model, stored)
    model.to(dtype or _dtype_of(stored, raw))
    _fill(config, model, stored, plan, device, each)
    return model.eval(), tokenizer


def load_tokenizer_of(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a model directory, None if it has none. Raises `UsageError` if it has more ids than the model."""
    if kind_of(directory / "tokenizer.json") is None:
        return None
    from cadre.hub.tokenizer import check_vocabulary, load_tokenizer

    tokenizer = load_tokenizer(directory)
    try:
        check_vocabulary(tokenizer, config.vocab_size)
    except UsageError as error:
        raise UsageError(f"{directory}: {error}") from None
    return tokenizer


def _plan(directory: Path, config: ModelConfig, model: Transformer, stored: dict[str, Stored]) -> dict[str, Piece]:
    """Which part of the model each stored tensor fills, after refusing a directory that is not exactly this model."""
    wanted = {piece.disk: piece for piece in pieces(config, model)}
    for piece in fused_pieces(config, model):
        if piece.disk in stored:
            wanted = {disk: other for disk, other in wanted.items() if other.state != piece.state}
            wanted[piece.disk] = piece
    _check_modules(directory, config, stored, wanted)
    missing = [disk for disk in wanted if disk not in stored]
    if missing:
        raise UsageError(f"{directory}: {_count(missing)} missing: {missing[0]}{' and others' if missing[1:] else ''}")
    copies, empty = _copies(config), hollow(config)
    for name, tensor in stored.items():
        if name in wanted:
            shape: tuple[int, ...] = wanted[name].shape
        elif name in copies:
            shape = tuple(model.embed_tokens.weight.shape)
        elif name in empty:
            shape = empty[name]
        elif name.endswith(SCALE_SUFFIX) and _is_fp8(stored.get(name.removesuffix(SCALE_SUFFIX))):
            shape = scale_shape(stored[name.removesuffix(SCALE_SUFFIX)].shape)
        elif name.endswith("rotary_emb.inv_freq"):
            continue
        else:
            raise UsageError(f"{tensor.file}: unexpected tensor {name}: the model of config.json has no such part")
        if tensor.shape != shape:
            raise UsageError(f"{tensor.file}: {name} has shape {list(tensor.shape)}; config.json wants {list(shape)}")
        if tensor.dtype not in _DTYPES:
            raise UsageError(f"{tensor.file}: {name} is stored as {tensor.dtype}; Cadre reads {', '.join(_DTYPES)}")
        if _is_fp8(tensor) and (len(shape) != 2 or name + SCALE_SUFFIX not in stored):
            raise UsageError(f"{tensor.file}: {name} is FP8 without scales of its blocks ({name}{SCALE_SUFFIX})")
    return wanted


def _check_modules(directory: Path, config: ModelConfig, stored: dict[str, Stored], wanted: dict[str, Piece]) -> None:
    """Refuse a number of multi-token prediction modules that differs from the config's."""
    count, found = config.num_nextn_predict_layers, modules_stored(config.num_hidden_layers, stored)
    beyond = [layer for layer in found if layer >= config.total_layers]
    if beyond:
        raise UsageError(
            f"{directory}: tensors of layer {beyond[0]}, but config.json has {config.num_hidden_layers} layers and"
            f" num_nextn_predict_layers {count}"
        )
    own = tuple(f"model.layers.{layer}." for layer in range(config.num_hidden_layers, config.total_layers))
    missing = [disk for disk in wanted if own and disk.startswith(own) and disk not in stored]
    if missing:
        raise UsageError(
            f"{directory}: num_nextn_predict_layers is {count}, but the modules are there in part only:"
            f" {_count(missing)} missing, {missing[0]} first"
        )


def stored_dtype(directory: Path) -> torch.dtype:
    """What `load` makes of a model directory's tensors unless it is told otherwise."""
    return _dtype_of(stored_tensors(directory), read_json_object(directory / "config.json"))


def _dtype_of(stored: dict[str, Stored], raw: dict[str, Any]) -> torch.dtype:
    size: Counter[str] = Counter()
    for name, tensor in stored.items():
        if not name.endswith((_CORRECTION_BIAS, SCALE_SUFFIX, "rotary_emb.inv_freq")):
            size[tensor.dtype] += torch.Size(tensor.shape).numel() * _DTYPES[tensor.dtype].itemsize
    if len(size) > 1 and _FP8 not in size:
        named = f"torch.{raw.get('dtype') or raw.get('torch_dtype')}"
        for dtype in _DTYPES.values():
            if str(dtype) == named:
                return dtype
    return _DTYPES[_FP8 if _FP8 in size else size.most_common(1)[0][0]]


def read_values(path: str | Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The parameters and router biases of a model directory by their names in the model, in its order: what `load` fills a
    model with, for one that is not to be whole in memory. Raises `UsageError` as `load` does."""
    directory = model_directory(path)
    config = load_config(directory)
    check_quantization(read_json_object(directory / "config.json"), str(directory / "config.json"))
    stored = stored_tensors(directory)
    model = skeleton(config)
    plan = _plan(directory, config, model, stored)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, parts in groupby(_read(config, stored, _in_order(plan, model), dtype), key=lambda part: part[0].state):
        whole = torch.empty(shapes[name], dtype=torch.float32 if name.endswith(_CORRECTION_BIAS) else dtype)
        for piece, part in parts:
            whole[piece.index].copy_(part)
        yield name, whole


@torch.no_grad()
def _fill(
    config: ModelConfig, model: Transformer, stored: dict[str, Stored], plan: dict[str, Piece], device: str | torch.device,
    each: Callable[[nn.Module], nn.Module] | None,
) -> None:  # fmt: skip
    """Module by module: storage, values, and what `each` makes of it."""
    parts = _read(config, stored, _in_order(plan, model), model.embed_tokens.weight.dtype)
    for owner, own in groupby(parts, key=lambda part: part[0].state.rpartition(".")[0]):
        module = give_storage(model.get_submodule(owner), device)
        state = module.state_dict()
        for piece, part in own:
            state[piece.state.rpartition(".")[2]][piece.index].copy_(part)
        if each is not None:
            model.set_submodule(owner, each(module))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
        if each is not None:
            model.set_submodule("lm_head", each(model.lm_head))


def _in_order(plan: dict[str, Piece], model: Transformer) -> dict[str, Piece]:
    """The plan in the order of the model's tensors, so that the parts of each are together."""
    order = {name: place for place, name in enumerate(model.state_dict())}
    return dict(sorted(plan.items(), key=lambda item: order[item[1].state]))


def _read(
    config: ModelConfig, stored: dict[str, Stored], plan: dict[str, Piece], dtype: torch.dtype
) -> Iterator[tuple[Piece, Tensor]]:
    """The tensors of a plan, each when it is asked for. Refuses values that are not finite, and copies that are none."""
    with ExitStack() as stack:
        open_files: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            file = stored[name].file
            if file not in open_files:
                # Mapped files would stay resident beside the parameters until closed; pread holds one tensor.
                open_files[file] = stack.enter_context(safe_open(file, framework="pt", backend="pread"))
            return open_files[file].get_tensor(name)

        def value(name: str) -> Tensor:
            if _is_fp8(stored[name]):
                return dequantize(read(name), read(name + SCALE_SUFFIX), dtype)
            return read(name)

        for name, piece in plan.items():
            part = value(name)
            if not part.isfinite().all():
                raise UsageError(f"{stored[name].file}: {name} holds values that are not finite: the file is damaged")
            narrows = dtype is torch.float16 and not piece.state.endswith(_CORRECTION_BIAS)
            if narrows and not part.to(dtype).isfinite().all():
                raise UsageError(f"{stored[name].file}: {name} holds numbers too large for float16; take bfloat16 or float32")
            yield piece, part
        for name, original in _copies(config).items():
            kept = disk_name(config, original)
            if name in stored and not torch.equal(value(name).to(dtype), value(kept).to(dtype)):
                raise UsageError(f"{stored[name].file}: {name} differs from {kept}, with which the model shares it")


def _copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that a directory may hold although the model has them under another name, and that name."""
    tied = {"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {}
    return {**duplicates(config), **tied}


def _is_fp8(tensor: Stored | None) -> bool:
    return tensor is not None and tensor.dtype == _FP8


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
