"""Writing models in the Hugging Face layout: a directory that `transformers` loads as it is, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cadre.errors import UsageError, write_error
from cadre.files import read_json_object, sync
from cadre.hub.directory import INDEX, WEIGHTS, config_with_eos, in_making, recover, set_aside
from cadre.hub.names import Shape, duplicates, hollow, pieces, skeleton
from cadre.hub.template import CHAT_TEMPLATE, CONVERSED_TEMPLATE, ChatTemplate, template_source
from cadre.kernels.limits import dtype_name
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What a model directory may hold for `save` to replace it: anything else is somebody's and would be lost.
_REPLACEABLE = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", INDEX),
)

# Of them, what says how the weights lie.
_MADE = ("config.json", INDEX)

# Others would be rounded to nothing: what quantizes has scales, too.
_KEPT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    fetch: Fetch | None = None,
    like: Path | None = None,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Write `config.json`, `generation_config.json`, safetensors of at most `max_shard_bytes` each (one tensor may be
    larger) with their index, and the tokenizer's files. `dtype` casts on the way; the router's correction bias stays
    float32. A model that is already there is replaced as a whole, its tokenizer included.

    `fetch` gives the tensors of a model that is not whole in this process's memory; never more than a file's are asked for
    before they are written. `like`: a model directory whose files beside config and weights (tokenizer, templates, settings of
    generation) are kept as they are, in the place of those that would be made; it may be `path` itself. `chat_template`: the
    one that the model was trained with, if on conversations. It is added where the directory has none, and the tokens of the
    config that end a text to the settings of generation.

    Everything is written to a folder beside `path` and flushed to disk; then two renames put the old model aside and
    the new one in place. A crash leaves the old model or the new one; between the renames, a moment, the old one is at
    `.NAME.old`, where `load` looks too and from where `recover` fetches it: the next `save` does, and a run that goes on.

    Raises `UsageError` for what the format cannot express, for a `dtype` that weights are not kept in, or whose range a weight
    exceeds, and for a `path` that holds other files; `RunError` when writing fails (a full disk). Nothing is left of the
    attempt then.
    """
    check_expressible(model.config)
    if dtype not in (None, *_KEPT):
        raise UsageError(f"dtype is {dtype}; weights are saved in {', '.join(map(dtype_name, _KEPT))}")
    target = Path(path).resolve()
    new, old = in_making(target), set_aside(target)
    _check_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        for leftover in (new, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        new.mkdir()
        try:
            _write(model, new, tokenizer, dtype, max_shard_bytes, fetch or _held(model))
            if like is not None:
                _keep(like, new)
            if chat_template is not None:
                _set_template(new, chat_template)
                _end_at(new)
            _swap(new, target, old)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise write_error(f"{target}: the model was not saved", error) from error


def _keep(like: Path, new: Path) -> None:
    """The files of a model directory that say nothing of its weights."""
    for name in _REPLACEABLE:
        if name not in _MADE and (like / name).is_file():
            shutil.copyfile(like / name, new / name)
            sync(new / name)


def _set_template(new: Path, trained: ChatTemplate) -> None:
    """Where the directory has no other template than the one that stands beside every model of ours. With it go the special
    tokens that it writes: they may be others than those that we know by their names."""
    present, values = template_source(new)
    if present in (None, CHAT_TEMPLATE):
        (new / "chat_template.jinja").unlink(missing_ok=True)
        source = CONVERSED_TEMPLATE if trained.untrained else trained.source
        _write_json(new / "tokenizer_config.json", values | trained.special | {"chat_template": source})
        sync(new / "tokenizer_config.json")


def _end_at(new: Path) -> None:
    """A kept `generation_config.json` may not name what ends an answer, and transformers heeds no other file."""
    ends = config_with_eos(new).eos_token_id
    file = new / "generation_config.json"
    if isinstance(ends, list):
        _write_json(file, read_json_object(file) | {"eos_token_id": ends})
        sync(file)


def check_expressible(config: ModelConfig) -> None:
    """Refuse what `transformers` cannot build or would compute differently. Raises `UsageError` naming the field."""
    kind = config.model_type
    if kind in ("deepseek_v2", "llama") and config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"hidden_size is {config.hidden_size}; a {kind} model on disk needs a multiple of num_attention_heads"
            f" ({config.num_attention_heads}): transformers builds no other"
        )
    if kind == "deepseek_v2" and config.num_nextn_predict_layers:
        raise UsageError(
            f"num_nextn_predict_layers is {config.num_nextn_predict_layers}; a deepseek_v2 model on disk has no"
            " multi-token prediction: set 0, or use deepseek_v3"
        )
    if kind == "deepseek_v2" and not config.rope_interleave:
        raise UsageError("rope_interleave is false; transformers' deepseek_v2 always rotates adjacent pairs: set true")
    if config.first_k_dense_replace and not config.family.dense_layers:
        raise UsageError(
            f"first_k_dense_replace is {config.first_k_dense_replace}; the layers of a {kind} model on disk are all sparse:"
            " set 0, or use qwen3_moe"
        )
    if config.num_nextn_predict_layers and config.first_k_dense_replace > config.num_hidden_layers:
        raise UsageError(
            f"first_k_dense_replace is {config.first_k_dense_replace}; on disk it is at most num_hidden_layers"
            f" ({config.num_hidden_layers}): transformers always builds multi-token prediction blocks with experts"
        )


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target}: is a file; a model is saved to a folder")
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [n for n in names if n not in _REPLACEABLE and not n.endswith(".safetensors")]
    if foreign or (names and "config.json" not in names):
        raise UsageError(f"{target}: holds {(foreign or names)[0]}, so it is not only a model; save to a new folder")


def _write(
    model: Transformer,
    folder: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    fetch: Fetch,
) -> None:
    config = model.config
    stored_dtype = dtype or model.embed_tokens.weight.dtype
    _write_json(folder / "config.json", {**config.to_hf(), "dtype": dtype_name(stored_dtype)})
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})
    _write_tensors(list(_tensors(model, dtype)), folder, max_shard_bytes, fetch)
    if tokenizer is not None:
        from cadre.hub.tokenizer import save_tokenizer

        save_tokenizer(tokenizer, folder)
    for file in folder.iterdir():
        sync(file)
    sync(folder)


class Fetch(Protocol):
    """Gives the part `state[name][index]` of a model."""

    def __call__(self, name: str, index: tuple[int | slice, ...]) -> Tensor: ...


def _held(model: Transformer) -> Fetch:
    """Of a model that is whole here."""
    state = model.state_dict()
    return lambda name, index: state[name][index]


@dataclass(frozen=True)
class _Pending:
    """A tensor to write. It is made only when its shard is written, so that casting never doubles the model."""

    name: str
    shape: Shape
    dtype: torch.dtype
    source: tuple[str, tuple[int | slice, ...]] | None
    copy: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self, fetch: Fetch) -> Tensor:
        if self.source is None:
            return torch.empty(self.shape, dtype=self.dtype)
        source = fetch(*self.source)
        made = source.to(device="cpu", dtype=self.dtype).contiguous()
        if self.dtype == torch.float16 and not made.isfinite().all() and source.isfinite().all():
            raise UsageError(f"{self.name} holds numbers too large for float16; take bfloat16 or float32")
        # safetensors refuses two names for one storage.
        return made.clone() if self.copy and made.data_ptr() == source.data_ptr() else made


def _tensors(model: Transformer, dtype: torch.dtype | None) -> Iterator[_Pending]:
    config, whole = model.config, skeleton(model.config)
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for piece in pieces(config, whole):
        cast = None if piece.state.endswith("e_score_correction_bias") else dtype
        yield _Pending(piece.disk, piece.shape, cast or dtypes[piece.state], (piece.state, piece.index))
    for name, original in duplicates(config).items():
        shape = tuple(whole.embed_tokens.weight.shape)
        yield _Pending(name, shape, dtype or dtypes[original], (original, ()), copy=True)
    for name, shape in hollow(config).items():
        yield _Pending(name, shape, dtype or dtypes["embed_tokens.weight"], None)


def _write_tensors(tensors: list[_Pending], folder: Path, max_shard_bytes: int, fetch: Fetch) -> None:
    shards: list[list[_Pending]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if tensor.bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: tensor.make(fetch) for tensor in shard}, folder / name, metadata={"format": "pt"})
        # safetensors makes files that only their owner reads; the others follow the user's umask.
        (folder / name).chmod((folder / "config.json").stat().st_mode)
        placed.update((tensor.name, name) for tensor in shard)
    if len(shards) > 1:
        size = sum(tensor.bytes for tensor in tensors)
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(new: Path, target: Path, old: Path) -> None:
    """Two renames, since no portable call exchanges two folders."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
