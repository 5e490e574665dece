"""Reading the shape of a model from the content of its `config.json`, family by family.

Both spellings of `transformers` 4 and 5 are read. What decides a count must be there: nothing is guessed. A field that no
family is known to have is reported as ignored, by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cadre.errors import UsageError
from cadre.files import read_json_object
from cadre.model.config import MOST_LAYERS
from cadre.plan.shape import Block, Experts, Grouped, Latent, Shape

# Fields that change neither a count nor a cost: the tokens' meaning, positions, training's noise, the library's own notes.
_IRRELEVANT = frozenset((
    "_attn_implementation_autoset", "_moe_implementation", "_name_or_path", "architectures", "attention_dropout",
    "attn_implementation", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "clip_qkv",
    "device_map", "dtype", "embedding_initializer_range", "eos_token_id", "ep_size", "hidden_act", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "max_window_layers",
    "model_type", "norm_topk_prob", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "partial_rotary_factor", "pretraining_tp", "problem_type", "return_dict", "rms_norm_eps",
    "rope_interleave", "rope_parameters", "rope_scaling", "rope_theta", "routed_scaling_factor", "router_aux_loss_coef",
    "router_jitter_noise", "scoring_func", "seq_aux", "tokenizer_class", "topk_method", "torch_dtype",
    "transformers_version", "use_cache", "use_sliding_window",
))  # fmt: skip

# The same field under another name, in other versions of transformers.
_ALIASES = {
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_local_experts": ("num_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_token",),
    "num_nextn_predict_layers": ("num_mtp_layers",),
}


# No number of a config is larger but by a slip of the pen.
_MOST = 10**9

_Norm = Literal["head", "all"] | None


@dataclass(frozen=True)
class Reading:
    """A shape, and what of its config was not understood and so left out (`ignored`) or is worth saying (`notes`)."""

    shape: Shape
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Fields:
    """The values of a config, each checked as it is asked for, with a record of what was asked."""

    values: dict[str, Any]
    where: str
    asked: set[str] = field(default_factory=set)

    def get(self, name: str) -> Any:
        """The value under this name or one of its aliases; None where it is absent or null."""
        names = (name, *_ALIASES.get(name, ()))
        given = {other: self.values[other] for other in names if self.values.get(other) is not None}
        self.asked.update(names)
        if len(set(map(repr, given.values()))) > 1:
            (one, first), (other, second) = list(given.items())[:2]
            raise UsageError(f"{self.where}: {one} is {first} but {other} is {second}: they are one field, give it once")
        return next(iter(given.values()), None)

    def whole(self, name: str, least: int = 1) -> int:
        """A whole number that must be there."""
        value = self.maybe(name, least)
        if value is None:
            kind = self.values.get("model_type")
            raise UsageError(f"{self.where}: {name} is missing; {kind} needs it: a whole number, at least {least}")
        return value

    def maybe(self, name: str, least: int = 1) -> int | None:
        value = self.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            self.refuse(name, value, f"a whole number, at least {least}")
        if value is not None and value > _MOST:
            self.refuse(name, value, f"at most {_MOST:,}")
        return value

    def stated(self, name: str, least: int = 1) -> int | None:
        """The same, and null where the config says null: silence would mean what the library's default happens to be."""
        if self.values.keys().isdisjoint((name, *_ALIASES.get(name, ()))):
            kind = self.values.get("model_type")
            raise UsageError(f"{self.where}: {name} is missing; {kind} needs it: null, or a whole number, at least {least}")
        return self.maybe(name, least)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return bool(value)

    def layers(self) -> int:
        """The number of decoder blocks, bounded so that a slip of the pen does not fill the memory."""
        layers = self.whole("num_hidden_layers")
        if layers > MOST_LAYERS:
            self.refuse("num_hidden_layers", layers, f"at most {MOST_LAYERS:,}")
        return layers

    def refuse(self, name: str, value: object, allowed: str) -> None:
        raise UsageError(f"{self.where}: {name} is {json.dumps(value, default=repr)}; it must be {allowed}")

    def ignored(self) -> tuple[str, ...]:
        """What nobody asked for and could matter, sorted."""
        return _unread(self.values, self.asked)


def _unread(values: dict[str, Any], asked: set[str]) -> tuple[str, ...]:
    """An empty or switched-off field says nothing."""
    unread = values.keys() - asked - _IRRELEVANT
    return tuple(sorted(name for name in unread if values[name] not in (None, False, 0, "", [], {})))


def read_shape(values: dict[str, Any], where: str = "config") -> Reading:
    """The shape that a `config.json`'s content describes. A multimodal config's `text_config` is read, and that is noted.

    Raises `UsageError` naming the family that is unknown, the field that is missing or wrong, and what would be right.
    """
    notes: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    kind, inner = values.get("model_type"), values.get("text_config")
    if not _known(kind) and isinstance(inner, dict) and _known(inner.get("model_type")):
        others = ", ".join(sorted(name for name in values if name.endswith("_config") and name != "text_config"))
        left = f" ({others} not counted)" if others else ""
        notes = (f"only the language model of this {kind} is planned: its text_config, a {inner['model_type']}{left}",)
        repeated = {name for name in values if name.endswith("_config") or values[name] == inner.get(name)}
        around = _unread(values, repeated)
        values, where = inner, f"{where}: text_config"
        kind = values["model_type"]
    if not _known(kind):
        said = "missing" if kind is None else repr(kind)
        raise UsageError(f"{where}: model_type is {said}; cadre plan knows {', '.join(sorted(_READERS))}")
    fields = _Fields(values, where)
    shape = _READERS[str(kind)](fields, str(kind))
    return Reading(shape, tuple(sorted({*around, *fields.ignored()})), notes)


def _known(kind: object) -> bool:
    return isinstance(kind, str) and kind in _READERS


def read_config(source: str | Path) -> tuple[dict[str, Any], str]:
    """The content of a `config.json`, named itself or by its model or run directory, and the file's name.

    Raises `UsageError` for a file that is missing or no JSON object.
    """
    path = Path(source)
    if path.is_dir():
        homes = (path / "config.json", path / "model" / "config.json")
        path = next((home for home in homes if home.exists()), homes[0])
    return read_json_object(path), str(path)


def _latent(f: _Fields) -> Latent:
    heads = f.whole("num_attention_heads")
    groups = f.maybe("num_key_value_heads")
    if groups not in (None, heads):
        f.refuse("num_key_value_heads", groups, f"{heads}, the number of heads: latent attention has no groups")
    nope, rotary, value = f.whole("qk_nope_head_dim"), f.whole("qk_rope_head_dim"), f.whole("v_head_dim")
    if rotary % 2:
        f.refuse("qk_rope_head_dim", rotary, "an even number: rotary dimensions turn in pairs")
    # What transformers 5 writes beside them.
    if f.maybe("qk_head_dim") not in (None, nope + rotary):
        f.refuse("qk_head_dim", f.get("qk_head_dim"), f"{nope + rotary}, by the widths of the heads' parts")
    if f.values.get("head_dim") in (nope + rotary, rotary, value):
        f.get("head_dim")
    return Latent(
        heads, f.whole("kv_lora_rank"), f.stated("q_lora_rank"), nope, rotary, value, f.flag("attention_bias")
    )  # fmt: skip


def _grouped(f: _Fields, *, bias: bool, output_bias: bool, qk_norm: _Norm = None, head_dim: int | None = None) -> Grouped:
    """`head_dim`: what the family takes where the config is silent; None for hidden size by heads."""
    heads, hidden = f.whole("num_attention_heads"), f.whole("hidden_size")
    # Where these two are silent each head has its own; the others' silence would mean 4, 8 or 32.
    silent = f.values.get("model_type") in ("llama", "olmoe")
    groups = (f.maybe if silent else f.stated)("num_key_value_heads") or heads
    width = f.maybe("head_dim") or head_dim
    if heads % groups:
        f.refuse("num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
    if width is None:
        if hidden % heads:
            f.refuse("num_attention_heads", heads, f"a divisor of hidden_size ({hidden}), or head_dim be given")
        width = hidden // heads
    return Grouped(heads, groups, width, bias, output_bias, qk_norm)


def _shape(f: _Fields, kind: str, attention: Latent | Grouped, blocks: list[Block], **rest: Any) -> Shape:
    """The shape with the fields that every family has."""
    types, has = f.get("mlp_layer_types"), ["sparse" if block.sparse else "dense" for block in blocks]
    if types not in (None, has):
        f.refuse(
            "mlp_layer_types", types, f"what the other fields say: {has.count('dense')} dense, {has.count('sparse')} sparse"
        )
    return Shape(
        model_type=kind,
        vocab_size=f.whole("vocab_size"),
        hidden_size=f.whole("hidden_size"),
        attention=attention,
        blocks=tuple(blocks),
        tie_word_embeddings=f.flag("tie_word_embeddings"),
        max_position_embeddings=f.maybe("max_position_embeddings"),
        **rest,
    )


def _windows(f: _Fields, kind: str) -> list[int | None]:
    """Each layer's sliding window as the qwen families have it, if it is switched on: by `layer_types`, or in the dense
    families from `max_window_layers` on."""
    layers, types = f.layers(), f.get("layer_types")
    f.maybe("sliding_window")
    kinds = ("full_attention", "sliding_attention")
    if types is not None and (not isinstance(types, list) or len(types) != layers or not all(kind in kinds for kind in types)):
        f.refuse("layer_types", types, f"{layers} times full_attention or sliding_attention")
    if not f.flag("use_sliding_window"):
        return [None] * layers
    window = f.whole("sliding_window")
    if types is None:
        first = 0 if kind == "qwen3_moe" else f.whole("max_window_layers", 0)
        return [window if layer >= first else None for layer in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in types]


def _deepseek(f: _Fields, kind: str, attention: Latent | Grouped | None = None) -> Shape:
    """deepseek_v3, kimi_k2 and glm4_moe_lite (the same shape), deepseek_v2 (no correction bias), and glm4_moe with its own
    attention."""
    if f.get("moe_layer_freq") not in (None, 1):
        f.refuse("moe_layer_freq", f.get("moe_layer_freq"), "1: experts in every layer after first_k_dense_replace")
    layers, extra = f.layers(), f.maybe("num_nextn_predict_layers", 0) or 0
    if extra > MOST_LAYERS:
        f.refuse("num_nextn_predict_layers", extra, f"at most {MOST_LAYERS:,}")
    dense = f.whole("first_k_dense_replace", 0)
    if dense > layers + extra:
        f.refuse("first_k_dense_replace", dense, f"at most {layers + extra}, the number of layers")
    blocks = [Block(layer >= dense) for layer in range(layers + extra)]
    names = ("n_routed_experts", "n_shared_experts", "moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group")
    for name in names:
        f.get(name)  # a dense model may hold them, unread
    return _shape(
        f, kind, attention or _latent(f), blocks[:layers], extra=tuple(blocks[layers:]),
        experts=_experts(f, kind) if blocks[-1].sparse else None,
        intermediate_size=f.whole("intermediate_size") if dense else f.maybe("intermediate_size"),
    )  # fmt: skip


def _glm4_moe_lite(f: _Fields, kind: str) -> Shape:
    """deepseek_v3 under another name; transformers writes which layers are dense, the publisher how many."""
    types, layers = f.get("mlp_layer_types"), f.layers()
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        f.refuse("mlp_layer_types", types, f"{layers} times dense or sparse")
    if types is None and f.get("first_k_dense_replace") is None:
        raise UsageError(f"{f.where}: mlp_layer_types is missing, and first_k_dense_replace: {kind} needs one of them")
    if types is not None:
        f.values = {**f.values, "first_k_dense_replace": types.count("dense")}
    return _deepseek(f, kind)


def _youtu(f: _Fields, kind: str) -> Shape:
    """deepseek_v3's attention, dense throughout; embeddings are tied unless it says otherwise."""
    f.values = {"tie_word_embeddings": True, **f.values}
    blocks = [Block(False)] * f.layers()
    return _shape(f, kind, _latent(f), blocks, intermediate_size=f.whole("intermediate_size"))


def _experts(f: _Fields, kind: str) -> Experts:
    routed, top_k = f.whole("n_routed_experts"), f.whole("num_experts_per_tok")
    if kind == "deepseek_v2" and f.get("topk_method") in (None, "greedy"):
        groups = limit = 1  # greedy never looks at groups
    else:
        groups, limit = f.stated("n_group") or 1, f.stated("topk_group") or 1
    if routed % groups:
        f.refuse("n_group", groups, f"a divisor of n_routed_experts ({routed})")
    if limit > groups:
        f.refuse("topk_group", limit, f"1 to n_group ({groups})")
    reachable = limit * (routed // groups)
    if top_k > reachable:
        f.refuse("num_experts_per_tok", top_k, f"1 to {reachable}: {limit} of {groups} groups of {routed // groups} experts")
    width, shared = f.whole("moe_intermediate_size"), f.stated("n_shared_experts", 0) or 0
    return Experts(routed, top_k, width, shared, kind != "deepseek_v2", groups, limit)


def _glm4_moe(f: _Fields, kind: str) -> Shape:
    norm: _Norm = "head" if f.flag("use_qk_norm") else None
    return _deepseek(f, kind, _grouped(f, bias=f.flag("attention_bias"), output_bias=False, qk_norm=norm))


def _top_k(f: _Fields, name: str, width: str) -> Experts:
    routed, top_k = f.whole(name), f.whole("num_experts_per_tok")
    if top_k > routed:
        f.refuse("num_experts_per_tok", top_k, f"1 to {name} ({routed})")
    return Experts(routed, top_k, f.whole(width))


def _qwen3_moe(f: _Fields, kind: str) -> Shape:
    bias = f.flag("attention_bias")
    f.flag("use_qk_norm")  # written by Qwen, always so in transformers
    step, only = f.maybe("decoder_sparse_step") or 1, f.get("mlp_only_layers") or []
    places = range(f.layers())
    if not isinstance(only, list) or not all(type(layer) is int and layer in places for layer in only):
        f.refuse("mlp_only_layers", only, f"a list of layer numbers, 0 to {len(places) - 1}")
    blocks = [Block(layer not in only and (layer + 1) % step == 0, window) for layer, window in enumerate(_windows(f, kind))]
    dense = any(not block.sparse for block in blocks)
    return _shape(
        f, kind, _grouped(f, bias=bias, output_bias=bias, qk_norm="head"), blocks,
        experts=_top_k(f, "num_experts", "moe_intermediate_size"),
        intermediate_size=f.whole("intermediate_size") if dense else f.maybe("intermediate_size"),
    )  # fmt: skip


def _olmoe(f: _Fields, kind: str) -> Shape:
    bias = f.flag("attention_bias")
    blocks = [Block(sparse=True)] * f.layers()
    attention = _grouped(f, bias=bias, output_bias=bias, qk_norm="all")
    return _shape(f, kind, attention, blocks, experts=_top_k(f, "num_experts", "intermediate_size"))


def _mixtral(f: _Fields, kind: str) -> Shape:
    blocks = [Block(True, f.maybe("sliding_window"))] * f.layers()
    attention = _grouped(f, bias=False, output_bias=False)
    return _shape(f, kind, attention, blocks, experts=_top_k(f, "num_local_experts", "intermediate_size"))


def _llama(f: _Fields, kind: str) -> Shape:
    bias = f.flag("attention_bias")
    return _shape(
        f, kind, _grouped(f, bias=bias, output_bias=bias), [Block(False)] * f.layers(),
        intermediate_size=f.whole("intermediate_size"), mlp_bias=f.flag("mlp_bias"),
    )  # fmt: skip


def _qwen(f: _Fields, kind: str) -> Shape:
    """qwen2 has biases on queries, keys and values; qwen3 has query-key norms and heads of 128 if the config is silent."""
    if kind == "qwen2":
        attention = _grouped(f, bias=True, output_bias=False)
    else:
        bias = f.flag("attention_bias")
        attention = _grouped(f, bias=bias, output_bias=bias, qk_norm="head", head_dim=128)
    blocks = [Block(False, window) for window in _windows(f, kind)]
    return _shape(f, kind, attention, blocks, intermediate_size=f.whole("intermediate_size"))


_READERS: dict[str, Callable[[_Fields, str], Shape]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": _glm4_moe_lite,
    "kimi_k2": _deepseek,
    "llama": _llama,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen3_moe,
    "youtu": _youtu,
}
