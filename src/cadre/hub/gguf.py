"""Writing models as GGUF: the one file that llama.cpp, and what is built on it, reads.

    latent attention      `deepseek2`
    glm4_moe              `glm4moe`
    qwen3_moe             `qwen3moe`
    llama, mixtral        `llama`
    others                as they are named

Names, keys and layouts are those that llama.cpp reads (src/models/deepseek2.cpp, glm4-moe.cpp, qwen3moe.cpp, olmoe.cpp,
llama.cpp). It cannot be told everything that a config can say: what it would compute differently is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch
from torch import Tensor

from cadre.errors import UsageError, write_error
from cadre.files import sync
from cadre.hub.directory import display_name, load_config, model_directory
from cadre.hub.gguf_tokenizer import tokenizer_keys
from cadre.hub.load import load_tokenizer_of, read_values, stored_dtype
from cadre.hub.names import skeleton
from cadre.model.config import ModelConfig
from cadre.model.rope import frequencies

if TYPE_CHECKING:
    import gguf

GgufType = Literal["f32", "f16", "bf16", "q8_0"]

ARCHITECTURES = {
    "deepseek_v3": "deepseek2", "deepseek_v2": "deepseek2", "glm4_moe": "glm4moe", "qwen3_moe": "qwen3moe",
    "mixtral": "llama", "olmoe": "olmoe", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
# llama.cpp's numbers for what makes probabilities of a router's logits.
SOFTMAX, SIGMOID = 1, 2
# Where llama.cpp tells DeepSeek-V2-Lite and its like, whose queries have no rank, by the number of layers.
_LITE_LAYERS = (26, 27)

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def write_gguf(
    source: str | Path,
    target: Path,
    dtype: GgufType | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the model directory, or the run directory, `source` as the file `target`, which appears whole or not at all; never
    more than one tensor is in memory.

    `dtype` is that of matrices, by default the one they are stored in: `q8_0` rounds blocks of 32 to 8 bits, and keeps f16
    where rows are no multiple of 32. Vectors and routers are float32. Modules of multi-token prediction, which llama.cpp does
    not read, are left out. `progress` hears how many of all tensors are written.

    Raises `UsageError` for a model that llama.cpp has no words for, `RunError` when writing fails.
    """
    gguf = gguf_library("writing")
    directory = model_directory(source)
    config = load_config(directory)
    check_gguf(config, str(directory))
    tokenizer = load_tokenizer_of(directory, config)
    arch = ARCHITECTURES[config.model_type]
    kind = dtype or {torch.float32: "f32", torch.float16: "f16"}.get(stored_dtype(directory), "bf16")
    keys = {
        "general.name": display_name(directory),
        "general.file_type": _file_type(gguf, kind),
        **{f"{arch}.{key}": value for key, value in _keys(config).items()},
        **(tokenizer_keys(tokenizer, config, directory) if tokenizer is not None else {"tokenizer.ggml.model": "none"}),
    }
    if kind == "q8_0":
        keys["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(gguf, partial, arch, keys, config, directory, kind, progress)
        sync(partial)
        partial.replace(target)
        sync(target.parent)
    except OSError as error:
        raise write_error(f"{target}: not written", error) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


# llama.cpp norms latents by the model's epsilon, where they have 1e-6: 1e-5 moves logits by 5e-5 of their spread, less than 16
# bits do; 1e-3 by a hundredth.
_EPS_OF_LATENTS = 1e-5


def check_gguf(config: ModelConfig, where: str) -> None:
    """Refuse what llama.cpp would compute differently. Raises `UsageError` naming the field."""

    def refuse(field: str, reason: str) -> None:
        raise UsageError(f"{where}: {field} is {getattr(config, field)}: {reason}")

    rope, kind = config.rope_parameters, config.model_type
    readable = ["default", "yarn"]
    if config.attention == "grouped":
        readable.append("linear")
    if ARCHITECTURES[kind] == "llama":
        readable.append("llama3")
    if rope.rope_type not in readable:
        raise UsageError(
            f"{where}: rope_type is {rope.rope_type}, which llama.cpp does not know of a {ARCHITECTURES[kind]} model"
        )
    if rope.rope_type == "yarn" and (rope.attention_factor is not None or not rope.truncate):
        raise UsageError(f"{where}: rope_parameters has an attention_factor or truncate = false, which GGUF cannot say")
    if config.attention == "latent":
        if rope.rope_type == "yarn" and not (rope.mscale and rope.mscale == rope.mscale_all_dim):
            raise UsageError(
                f"{where}: rope_parameters has mscale {rope.mscale} and mscale_all_dim {rope.mscale_all_dim};"
                " llama.cpp scales as if both were one number"
            )
        if config.rms_norm_eps > _EPS_OF_LATENTS:
            refuse("rms_norm_eps", "llama.cpp would norm the latents by it too, which have 1e-6")
        if config.attention_bias:
            refuse("attention_bias", "llama.cpp's latent attention has no biases")
        if kind == "deepseek_v2" and config.has_experts and config.n_group > 1:
            refuse("n_group", "llama.cpp scores a group by its two best experts, deepseek_v2 by the best")
        if config.num_hidden_layers in _LITE_LAYERS and config.q_lora_rank:
            refuse("num_hidden_layers", "so deep llama.cpp takes a model for DeepSeek-V2-Lite, which has no q_lora_rank")
    elif rope.rope_type == "yarn" and (rope.mscale or rope.mscale_all_dim):
        raise UsageError(f"{where}: rope_parameters has mscale, which llama.cpp reads of latent attention only")
    if kind == "glm4_moe" and not config.has_experts:
        refuse("first_k_dense_replace", "llama.cpp reads no glm4moe without experts")
    if config.has_experts and config.family.like_deepseek and not config.n_shared_experts:
        refuse("n_shared_experts", "llama.cpp reads no model of this kind whose experts are all routed")
    if kind in ("qwen3_moe", "olmoe", "qwen3") and config.attention_bias:
        refuse("attention_bias", f"llama.cpp's {ARCHITECTURES[kind]} has no biases")
    if kind == "qwen3_moe":
        if config.first_k_dense_replace:
            refuse("first_k_dense_replace", "llama.cpp reads experts in every layer of a qwen3moe")
        if not config.norm_topk_prob:
            refuse("norm_topk_prob", "llama.cpp always normalises the weights of a qwen3moe's experts")
    if kind == "olmoe":
        if config.norm_topk_prob:
            refuse("norm_topk_prob", "llama.cpp never normalises the weights of an olmoe's experts")
        if config.tie_word_embeddings:
            refuse("tie_word_embeddings", "llama.cpp reads an olmoe's head from a tensor of its own")
        if config.num_key_value_heads != config.num_attention_heads:
            refuse("num_key_value_heads", "llama.cpp's olmoe has as many as heads")


def _keys(config: ModelConfig) -> dict[str, Any]:
    """What llama.cpp has to know of a model, by its keys without the architecture's name in front."""
    heads = config.num_attention_heads
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size or config.moe_intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.qk_head_dim,
        "attention.value_length": config.value_head_dim,
        "rope.dimension_count": config.rotary_dim,
        **_rope_keys(config),
    }
    if config.attention == "latent":
        rank = config.kv_lora_rank or 0
        # Absorbed, it is attention of one key-value head: latent and rotary key.
        keys |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": config.q_lora_rank or 0,
            "attention.kv_lora_rank": rank,
            "attention.key_length": rank + config.rotary_dim,
            "attention.value_length": rank,
            "attention.key_length_mla": config.qk_head_dim,
            "attention.value_length_mla": config.value_head_dim,
        }
    if config.family.like_deepseek:
        keys["leading_dense_block_count"] = min(config.first_k_dense_replace, config.num_hidden_layers)
        keys["expert_feed_forward_length"] = config.moe_intermediate_size or config.intermediate_size
        keys["expert_shared_count"] = config.n_shared_experts
    if config.has_experts:
        keys |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if config.has_experts and config.family.like_deepseek:
        keys |= {
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": config.norm_topk_prob,
            "expert_gating_func": SIGMOID if config.scoring_func == "sigmoid" else SOFTMAX,
        }
    return keys


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    keys: dict[str, Any] = {"rope.freq_base": float(rope.rope_theta)}
    if rope.rope_type in ("default", "llama3"):  # llama3's scaling is a tensor
        return {**keys, "rope.scaling.type": "none"}
    keys |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type == "yarn":
        keys |= {
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        if config.attention == "latent" and rope.mscale_all_dim:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
    return keys


def named_tensors(config: ModelConfig, state: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The model's tensor `state` as llama.cpp keeps it: one or two of its names, each with what it is; none of a module of
    multi-token prediction. Works on meta tensors, too."""
    whole = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if state in whole:
        if state != "lm_head.weight" or not config.tie_word_embeddings:
            yield whole[state], value
        return
    folder, layer, rest = state.split(".", 2)
    if folder != "layers":
        return  # a module of multi-token prediction
    block = f"blk.{layer}."
    part, _, last = rest.rpartition(".")
    if last == "e_score_correction_bias":
        yield block + "exp_probs_b.bias", value
    elif part == "mlp.experts":
        if last == "down_proj":
            yield block + "ffn_down_exps.weight", value
        else:
            gate, up = value.chunk(2, dim=1)
            yield block + "ffn_gate_exps.weight", gate
            yield block + "ffn_up_exps.weight", up
    elif part == "self_attn.kv_b_proj":
        # [H (nope + v), rank]: keys are absorbed into queries, [H, rank, nope]; values come after the sum, [H, v, rank].
        nope, heads = config.qk_nope_head_dim or 0, config.num_attention_heads
        keys, values = value.unflatten(0, (heads, -1)).split([nope, config.value_head_dim], dim=1)
        yield block + "attn_k_b.weight", keys.transpose(1, 2)
        yield block + "attn_v_b.weight", values
    elif part == "post_attention_layernorm" and config.model_type == "glm4_moe":
        yield block + "post_attention_norm.weight", value
    else:
        yield f"{block}{_PARTS[part]}.{last}", _turned(config, part.rpartition(".")[2], value)


def _turned(config: ModelConfig, part: str, value: Tensor) -> Tensor:
    """Rotary pairs side by side, as llama.cpp turns them in `llama` and `deepseek2`; on disk they may be half a head apart."""
    turned, size = config.rotary_dim, config.qk_head_dim
    if ARCHITECTURES[config.model_type] == "llama" and part in ("q_proj", "k_proj"):
        return _side_by_side(value.unflatten(0, (-1, size)), 0).flatten(0, 1)
    if config.attention == "latent" and not config.rope_interleave:
        if part in ("q_proj", "q_b_proj"):
            return _side_by_side(value.unflatten(0, (-1, size)), size - turned).flatten(0, 1)
        if part == "kv_a_proj_with_mqa":
            return _side_by_side(value[None], len(value) - turned)[0]
    return value


def _side_by_side(value_HR: Tensor, first: int) -> Tensor:
    """[H, R, ...]: rows `first` and on of each head, halves of pairs apart before, adjacent after."""
    kept, turned = value_HR[:, :first], value_HR[:, first:]
    return torch.cat((kept, turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), dim=1)


def _write(
    gguf: Any,
    path: Path,
    arch: str,
    keys: dict[str, Any],
    config: ModelConfig,
    directory: Path,
    kind: str,
    progress: Callable[[int, int], None],
) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        _add(writer, key, value)
    extra = _rope_factors(config)
    encoding: dict[str, Any] = {}
    for state, meta in skeleton(config).state_dict().items():
        for name, part in named_tensors(config, state, meta):
            encoding[name] = _encoding(gguf, name, tuple(part.shape), kind)
            _announce(gguf, writer, name, tuple(part.shape), encoding[name])
    for name, value in extra.items():
        encoding[name] = gguf.GGMLQuantizationType.F32
        _announce(gguf, writer, name, tuple(value.shape), encoding[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensors = (
            named for state, value in read_values(directory, torch.float32) for named in named_tensors(config, state, value)
        )
        for done, (name, value) in enumerate(chain(tensors, extra.items()), 1):
            if encoding[name] == gguf.GGMLQuantizationType.F16 and value.abs().max() > torch.finfo(torch.float16).max:
                raise UsageError(f"{directory}: {name} holds numbers too large for f16; take bf16 or f32")
            writer.write_tensor_data(gguf.quants.quantize(value.contiguous().numpy(), encoding[name]))
            progress(done, len(encoding))
    finally:
        writer.close()


def _encoding(gguf: Any, name: str, shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return types.F32
    if kind == "q8_0" and shape[-1] % 32:
        return types.F16
    return types[kind.upper()]


def _announce(
    gguf: Any, writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], encoding: gguf.GGMLQuantizationType
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[encoding]
    writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), math.prod(shape) // block * size, raw_dtype=encoding)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """llama3's scaling: what each frequency is divided by."""
    if config.rope_parameters.rope_type != "llama3":
        return {}
    plain = config.model_copy(
        update={"rope_parameters": type(config.rope_parameters)(rope_theta=config.rope_parameters.rope_theta)}
    )
    return {"rope_freqs.weight": frequencies(plain)[0] / frequencies(config)[0]}


def _file_type(gguf: Any, kind: str) -> int:
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    return int(gguf.LlamaFileType[names[kind]])


def gguf_library(doing: str) -> Any:
    """The gguf package. Raises `UsageError` where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UsageError(f"{doing} GGUF needs the gguf package: pip install 'cadre-lm[gguf]'") from None
    return gguf
