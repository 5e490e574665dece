"""The model's forward pass for a few tokens, through the C++ kernels: what decoding on a CPU runs on.

Reads the weights where they are (float32, bfloat16, or quantized) and the same cache pages as the torch path; the residual
stream is float32. Letters in names: T token, D hidden, W vocabulary (words), L sparse layer, E expert, K expert choices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.infer.quantize import weight_of, weights_of
from cadre.kernels.native.library import library
from cadre.kernels.native.structs import KINDS, Cache, DenseLayer, ExpertsLayer, GroupedLayer, Keeper, LatentLayer, Step
from cadre.kernels.quantized import QuantizedMatrix
from cadre.kernels.routing import router
from cadre.model.attention import LATENT_NORM_EPS, LatentAttention
from cadre.model.experts import MixtureOfExperts
from cadre.model.layers import RMSNorm
from cadre.model.transformer import Block, MultiTokenPredictor, Transformer

if TYPE_CHECKING:
    from cadre.infer.pages import PagePool
    from cadre.infer.runner import Batch

Part = Callable[[Any], None]  # takes a reference to a Step

# So many tokens of one sequence always run natively, whoever else is served; a longer piece is faster in torch, which expands
# the latents.
NATIVE_TOKENS = 192
# Rows of one pass, which bounds what it takes for its activations; a sequence's own are never parted.
NATIVE_ROWS = 256


class NativeModel:
    """A model bound to one pool. load_LE: tokens that each expert of each sparse layer has had. choice_LTK: the experts of
    the last pass's tokens, int32, main model's layers only."""

    @classmethod
    def build(cls, model: Transformer, pool: PagePool) -> NativeModel | None:
        """None where the kernels cannot serve: no compiler, another device than a CPU, other dtypes."""
        usable = {model.embed_tokens.weight.dtype, pool.first.dtype} <= set(KINDS) and pool.first.device.type == "cpu"
        kernels = library() if usable else None
        return None if kernels is None else cls(model, pool, kernels)

    def __init__(self, model: Transformer, pool: PagePool, kernels: ctypes.CDLL) -> None:
        config = model.config
        self.model, self.pool, self.kernels, self.keep = model, pool, kernels, Keeper()
        self.threads = torch.get_num_threads()
        sparse = sum(config.is_sparse(layer) for layer in range(config.total_layers))
        self.load_LE = torch.zeros(sparse, config.n_routed_experts or 0, dtype=torch.int64)
        self.choice_LTK = torch.empty(sparse, 0, config.num_experts_per_tok or 0, dtype=torch.int32)
        self.sparse = 0
        self.blocks = [self._block(cast(Block, block), index) for index, block in enumerate(model.layers)]
        self.norm = self._norm(model.norm)
        self.head = self.keep.matrix(weight_of(model.lm_head))
        stages = cast(list[MultiTokenPredictor], list(model.mtp)[: len(pool.first) - len(model.layers)])
        self.stages = [
            (
                self._norm(stage.enorm),
                self._norm(stage.hnorm),
                self.keep.matrix(weight_of(stage.eh_proj)),
                self._block(stage.block, len(model.layers) + index),
                self._norm(stage.norm),
            )
            for index, stage in enumerate(stages)
        ]

    @property
    def narrow(self) -> bool:
        """Whether weights are kept narrower than float32: a product in torch would first widen the whole matrix."""
        weight = weight_of(self.model.layers[0].self_attn.o_proj)  # type: ignore[union-attr, arg-type]
        return not isinstance(weight, Tensor) or weight.dtype != torch.float32

    @property
    def halves(self) -> bool:
        """Whether weights are bfloat16, or were before they were quantized."""
        weight = weight_of(self.model.layers[0].self_attn.o_proj)  # type: ignore[union-attr, arg-type]
        computed = self.model.compute_dtype
        if isinstance(weight, QuantizedMatrix):
            return computed == torch.bfloat16
        return weight.dtype == torch.bfloat16 and computed in (None, torch.bfloat16)

    def embedded(self, ids_T: Tensor) -> Tensor:
        """The residual stream [T, D] at its beginning, float32."""
        return F.embedding(ids_T, self.model.embed_tokens.weight).float()

    def feed_forward(self, layer: int, x_TD: Tensor) -> None:
        """The second half of a block, added to the residual stream in place."""
        self._make_room(len(x_TD))
        step = Step(x=x_TD.data_ptr(), tokens=len(x_TD), width=x_TD.shape[1], threads=self.threads)
        self.blocks[layer][1](ctypes.byref(step))

    def normed(self, x_TD: Tensor) -> Tensor:
        """The final norm."""
        return self._normed(self.norm, x_TD)

    def hidden(self, batch: Batch) -> Tensor:
        """Normed hidden states [T, D], float32."""
        x_TD = self.embedded(batch.ids_T)
        self._run(x_TD, batch, self.blocks)
        return self.normed(x_TD)

    def choices(self, tokens: int) -> list[Tensor]:
        """The experts of the last pass's tokens, of each sparse layer: int64 [T, K]."""
        return [choice_TK[:tokens].long() for choice_TK in self.choice_LTK]

    def draft_hidden(self, depth: int, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """Hidden states [T, D] of multi-token prediction module `depth`: see `Transformer.mtp_hidden`."""
        enorm, hnorm, joining, block, norm = self.stages[depth]
        next_TD = self.embedded(batch.ids_T)
        joined = torch.cat((self._normed(enorm, next_TD), self._normed(hnorm, hidden_TD.float().contiguous())), dim=1)
        x_TD = self._linear(joining, joined)
        self._run(x_TD, batch, [block])
        return self._normed(norm, x_TD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 [N, W] of normed hidden states [N, D]."""
        parts = [self._linear(self.head, part.contiguous()) for part in hidden_ND.float().split(NATIVE_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, x_TD: Tensor, batch: Batch, blocks: list[list[Part]]) -> None:
        sequences = len(batch.count_B)
        self._make_room(len(x_TD))
        turn_TR = self.model.rotary(int(batch.position_T.max()) + 1, x_TD.device)
        numbers = ctypes.c_int32 * sequences
        count, start = numbers(*batch.count_B), numbers(*batch.start_B)
        step = Step(
            x_TD.data_ptr(),
            turn_TR.data_ptr(),
            batch.position_T.data_ptr(),
            ctypes.addressof(count),
            ctypes.addressof(start),
            batch.page_BP.data_ptr(),
            len(x_TD),
            sequences,
            batch.page_BP.stride(0),
            x_TD.shape[1],
            self.threads,
        )
        given = ctypes.byref(step)
        for block in blocks:
            for part in block:
                part(given)

    def _make_room(self, tokens: int) -> None:
        if self.choice_LTK.shape[1] < tokens:
            self.choice_LTK = self.choice_LTK.new_empty(len(self.load_LE), tokens, self.choice_LTK.shape[2])

    def _normed(self, norm: tuple[int, float], x_TD: Tensor) -> Tensor:
        y_TD = torch.empty_like(x_TD)
        step = Step(x=x_TD.data_ptr(), tokens=len(x_TD), width=x_TD.shape[1], threads=1)
        self.kernels.cadre_norm(*norm, ctypes.byref(step), y_TD.data_ptr())
        return y_TD

    def _linear(self, matrix: Any, x_ND: Tensor) -> Tensor:
        y_NM = x_ND.new_empty(len(x_ND), matrix.rows)
        self.kernels.cadre_linear(ctypes.byref(matrix), x_ND.data_ptr(), len(x_ND), self.threads, y_NM.data_ptr())
        return y_NM

    def _norm(self, norm: RMSNorm) -> tuple[int, float]:
        return self.keep.vector(norm.weight) or 0, norm.eps

    def _block(self, block: Block, layer: int) -> list[Part]:
        """The two halves of a block, each one call."""
        return [self._attention(block, layer), self._feed_forward(block)]

    def _attention(self, block: Block, layer: int) -> Part:
        keep, attention = self.keep, block.self_attn
        first, second = self.pool.first[layer], self.pool.second[layer]
        cache = Cache(first.data_ptr(), second.data_ptr(), KINDS[first.dtype], self.pool.page_size)
        norm, eps = self._norm(block.input_layernorm)
        given: LatentLayer | GroupedLayer
        if isinstance(attention, LatentAttention):
            low_rank = attention.low_rank_query
            given = LatentLayer(
                norm=norm,
                q_a_norm=keep.vector(attention.q_a_layernorm.weight) if low_rank else None,
                kv_a_norm=keep.vector(attention.kv_a_layernorm.weight),
                q_a=keep.matrix(weight_of(attention.q_a_proj) if low_rank else None),
                q=keep.matrix(weight_of(attention.q_b_proj if low_rank else attention.q_proj)),
                kv_a=keep.matrix(weight_of(attention.kv_a_proj_with_mqa)),
                kv_b=keep.matrix(weight_of(attention.kv_b_proj)),
                o=keep.matrix(weight_of(attention.o_proj)),
                q_a_bias=keep.vector(attention.q_a_proj.bias) if low_rank else None,
                kv_a_bias=keep.vector(attention.kv_a_proj_with_mqa.bias),
                o_bias=keep.vector(attention.o_proj.bias),
                eps=eps,
                inner_eps=LATENT_NORM_EPS,
                scale=attention.scale,
                heads=attention.heads,
                nope=attention.nope,
                rotary=attention.rotary,
                value=attention.value,
                latent=attention.latent,
                split=not self.model.config.rope_interleave,
            )
            run = self.kernels.cadre_latent_attention
        else:
            given = GroupedLayer(
                norm=norm,
                q_norm=None if attention.q_norm is None else keep.vector(attention.q_norm.weight),
                k_norm=None if attention.k_norm is None else keep.vector(attention.k_norm.weight),
                **{part: keep.matrix(weight_of(getattr(attention, f"{part}_proj"))) for part in "qkvo"},
                **{f"{part}_bias": keep.vector(getattr(attention, f"{part}_proj").bias) for part in "qkvo"},
                eps=eps,
                scale=attention.scale,
                heads=attention.heads,
                groups=attention.groups,
                width=first.shape[-1],
                rotary=attention.rotary,
                together=attention.norms_together,
            )
            run = self.kernels.cadre_grouped_attention
        layer_ref, cache_ref = ctypes.byref(given), ctypes.byref(cache)
        return lambda step: run(layer_ref, cache_ref, step)

    def _feed_forward(self, block: Block) -> Part:
        keep, mlp, config = self.keep, block.mlp, self.model.config
        norm, eps = self._norm(block.post_attention_layernorm)
        if not isinstance(mlp, MixtureOfExperts):
            gate, up, down = (keep.matrix(weight_of(part)) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            dense = ctypes.byref(DenseLayer(norm, gate, up, down, eps))
            return lambda step: self.kernels.cadre_dense(dense, step)
        gate_up, down_stack = weights_of(mlp.experts)
        shared = mlp.shared_experts
        experts = ctypes.byref(
            ExpertsLayer(
                norm=norm,
                router=router(mlp.gate.rule, keep.vector(mlp.gate.e_score_correction_bias), config.n_routed_experts or 0),
                router_weight=keep.matrix(mlp.gate.weight.float()),  # nothing of its products is rounded
                gate_up=keep.matrix(gate_up),
                down=keep.matrix(down_stack),
                shared_gate=keep.matrix(None if shared is None else weight_of(shared.gate_proj)),
                shared_up=keep.matrix(None if shared is None else weight_of(shared.up_proj)),
                shared_down=keep.matrix(None if shared is None else weight_of(shared.down_proj)),
                eps=eps,
                width=config.moe_intermediate_size,
            )
        )
        number, self.sparse = self.sparse, self.sparse + 1
        load = self.load_LE[number].data_ptr()
        return lambda step: self.kernels.cadre_experts(experts, step, load, self.choice_LTK[number].data_ptr())
