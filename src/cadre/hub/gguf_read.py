"""Reading GGUF files: what `hub/gguf.py` writes, and what others have written of the same architectures in whatever number of
bits. The way back from llama.cpp's names, keys and layouts to a model and its tokenizer.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cadre.errors import UsageError, one_line
from cadre.hub.gguf import ARCHITECTURES, SIGMOID, SOFTMAX, gguf_library, named_tensors
from cadre.hub.gguf_tokenizer import tokenizer_of
from cadre.hub.names import give_storage, skeleton
from cadre.hub.tokenizer import save_tokenizer
from cadre.model.config import ModelConfig
from cadre.model.families import FAMILIES
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Key = Callable[..., Any]  # a key of the file's architecture by its name, or what else is given if the file lacks it


@dataclass(frozen=True)
class FromGguf:
    """A model, its tokenizer and chat template, None where the file has none. Matrices are in the dtype that they were stored
    in, bfloat16 if that was of fewer bits."""

    model: Transformer
    tokenizer: Tokenizer | None
    chat_template: str | None


def read_gguf(path: Path, dtype: torch.dtype | None = None) -> FromGguf:
    """Read a GGUF file of one of `ARCHITECTURES`. Raises `UsageError` for a file that is none, is damaged, or holds what Cadre
    cannot compute."""
    gguf = gguf_library("reading")
    try:
        file = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in file.fields.items()}
        stored = {tensor.name: tensor for tensor in file.tensors}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # the library raises whatever a damaged file leads it to
        raise UsageError(f"{path}: is no whole GGUF file ({one_line(error)})") from None
    try:
        config = _config(keys, stored.keys())
        tokenizer = tokenizer_of(keys)
        embedding = stored["token_embd.weight"]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except KeyError as error:
        raise UsageError(f"{path}: has no {error.args[0]}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UsageError(f"{path}: its keys contradict each other ({one_line(error)})") from None
    kinds = {"F32": torch.float32, "F16": torch.float16}
    dtype = dtype or kinds.get(embedding.tensor_type.name, torch.bfloat16)
    model = give_storage(skeleton(config).to(dtype), "cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    with torch.no_grad():
        _fill(gguf, model, stored, path)
    return FromGguf(model.eval(), tokenizer, keys.get("tokenizer.chat_template"))


@contextmanager
def tokenizer_files(read: FromGguf) -> Iterator[Path]:
    """A folder with what a model directory holds of the tokenizer, for as long as it is looked at."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if read.tokenizer is not None:
            save_tokenizer(read.tokenizer, folder)
            file = folder / "tokenizer_config.json"
            values = json.loads(file.read_text(encoding="utf-8"))
            config = read.model.config
            end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
            for kind, number in (("bos_token", config.bos_token_id), ("eos_token", end)):
                if number is not None:
                    values[kind] = read.tokenizer.id_to_token(number)
            values.pop("chat_template", None)
            if read.chat_template is not None:
                values["chat_template"] = read.chat_template
            file.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        yield folder


def _fill(gguf: Any, model: Transformer, stored: dict[str, Any], path: Path) -> None:
    config, left = model.config, set(stored)
    for state, meta in skeleton(config).state_dict().items():
        parts = []
        for name, like in named_tensors(config, state, meta):
            if name not in stored:
                raise UsageError(f"{path}: lacks the tensor {name}")
            tensor = stored[name]
            shape = tuple(int(size) for size in reversed(tensor.shape))
            if shape != tuple(like.shape):
                raise UsageError(f"{path}: {name} has shape {list(shape)}; its keys want {list(like.shape)}")
            part = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(shape)
            if not part.isfinite().all():
                raise UsageError(f"{path}: {name} holds values that are not finite: the file is damaged")
            parts.append(part)
            left.discard(name)
        if parts:
            model.state_dict()[state].copy_(_joined(config, state, parts))
    if left:
        raise UsageError(f"{path}: holds a tensor {min(left)}, which Cadre's {config.model_type} has not")


def _joined(config: ModelConfig, state: str, parts: list[Tensor]) -> Tensor:
    """What `named_tensors` made `parts` of."""
    part = state.rpartition(".")[0].rpartition(".")[2]
    if state.endswith("experts.gate_up_proj"):
        return torch.cat(parts, dim=1)
    if part == "kv_b_proj":
        keys, values = parts
        return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
    if ARCHITECTURES[config.model_type] == "llama" and part in ("q_proj", "k_proj"):
        (rows,) = parts
        return rows.unflatten(0, (-1, config.qk_head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return parts[0]


def _kind(arch: str, experts: int) -> str:
    """The first family that llama.cpp knows by this name."""
    if arch == "llama":
        return "mixtral" if experts else "llama"
    return next(kind for kind, name in ARCHITECTURES.items() if name == arch)


def _config(keys: dict[str, Any], tensors: Any) -> ModelConfig:
    arch = keys.get("general.architecture")
    known = sorted(set(ARCHITECTURES.values()))
    if arch not in known:
        raise UsageError(f"general.architecture is {arch!r}; Cadre reads {', '.join(known)}")

    def key(name: str, otherwise: Any = KeyError) -> Any:
        name = f"{arch}.{name}"
        value = keys[name] if otherwise is KeyError else keys.get(name, otherwise)
        if isinstance(value, list):
            raise UsageError(f"{name}: differs from layer to layer, which it does in no model that Cadre computes")
        return value

    if "rope_freqs.weight" in tensors:
        raise UsageError(
            "rope_freqs.weight: holds how positions are scaled, as Llama 3.1's are, which no config can say from that"
        )
    if key("nextn_predict_layers", 0):
        raise UsageError(f"{arch}.nextn_predict_layers: modules of multi-token prediction are not read from GGUF")
    heads, experts = key("attention.head_count"), key("expert_count", 0)
    values: dict[str, Any] = {
        "model_type": _kind(arch, experts),
        "vocab_size": key("vocab_size", len(keys.get("tokenizer.ggml.tokens", ()))),
        "hidden_size": key("embedding_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "intermediate_size": key("feed_forward_length"),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "rope_parameters": _rope(key),
        **_token_ids(keys),
    }
    if arch == "deepseek2":
        values |= _latent(key)
    else:
        values["num_key_value_heads"] = key("attention.head_count_kv", heads)
        values["head_dim"] = key("attention.key_length", values["hidden_size"] // heads)
    if arch == "glm4moe":
        values["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
        values["rope_parameters"]["partial_rotary_factor"] = _share(key("rope.dimension_count"), values["head_dim"])
    family = FAMILIES[values["model_type"]]
    if family.like_deepseek:
        values["first_k_dense_replace"] = key("leading_dense_block_count", 0)
    if not family.dense_layers:
        del values["intermediate_size"]  # it is that of the experts
    if family.scoring is not None and experts:
        values |= {
            "n_routed_experts": experts,
            "num_experts_per_tok": key("expert_used_count"),
            "moe_intermediate_size": key("expert_feed_forward_length", None) or key("feed_forward_length"),
        }
    if arch == "qwen3moe":
        values["norm_topk_prob"] = True  # llama.cpp knows no other
    if family.like_deepseek and experts:
        if key("expert_gating_func", SOFTMAX if arch == "deepseek2" else SIGMOID) == SOFTMAX:
            values["model_type"] = "deepseek_v2"
        values |= {
            "n_shared_experts": key("expert_shared_count", 0),
            "n_group": key("expert_group_count", 1),
            "topk_group": key("expert_group_used_count", 1),
            "routed_scaling_factor": float(key("expert_weights_scale", 1.0)) or 1.0,
            "norm_topk_prob": bool(key("expert_weights_norm", False)),
        }
    return ModelConfig(**values)


def _latent(key: Key) -> dict[str, Any]:
    """The widths of multi-head latent attention."""
    if key("attention.key_length_mla", None) is None:
        raise UsageError("deepseek2.attention.key_length_mla is missing: the file is of llama.cpp's older layout; convert anew")
    rotary = key("rope.dimension_count")
    return {
        "kv_lora_rank": key("attention.kv_lora_rank"),
        "q_lora_rank": key("attention.q_lora_rank", 0) or None,
        "qk_nope_head_dim": key("attention.key_length_mla") - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": key("attention.value_length_mla"),
    }


def _share(part: int, whole: int) -> float:
    """`part / whole`, such that `int(whole * share)` is `part` again: a quotient may be rounded down."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1)


def _token_ids(keys: dict[str, Any]) -> dict[str, Any]:
    """What begins, ends and pads a text; a turn of a conversation may end otherwise than a text."""
    bos, eos, eot, pad = (keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding"))
    return {"bos_token_id": bos, "eos_token_id": eos if eot in (None, eos) else [eos, eot], "pad_token_id": pad}


def _rope(key: Key) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(key("rope.freq_base", 10000.0))}
    kind = key("rope.scaling.type", "none")
    factor = float(key("rope.scaling.factor", 0.0))
    if kind == "none" or not factor:
        return rope
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": key("rope.scaling.original_context_length"),
            "beta_fast": float(key("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(key("rope.scaling.yarn_beta_slow", 1.0)),
        }
        multiplier = key("rope.scaling.yarn_log_multiplier", None)
        if multiplier is not None:
            rope["mscale"] = rope["mscale_all_dim"] = round(multiplier * 10, 6)
    return rope
