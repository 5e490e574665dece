"""How fast a model of some shape decodes here: the engine at work on random weights, against the machine's memory rate."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from cadre.errors import UsageError
from cadre.infer.bench.peer import PeerDecoder
from cadre.infer.engine import Engine
from cadre.infer.pages import PAGE_SIZE, bytes_for
from cadre.infer.quantize import QuantizedLinear, quantize_model
from cadre.infer.request import Request
from cadre.infer.sampling import Sampling
from cadre.kernels.limits import best_dtype, default_device, dtype_name, peak_memory_bytes, read_bytes_per_second
from cadre.kernels.memory import free_bytes
from cadre.kernels.native.library import must_compile, why_missing
from cadre.model.config import ModelConfig
from cadre.model.layers import RMSNorm
from cadre.model.transformer import Transformer
from cadre.plan.count import count

Note = Callable[[str], None]

WARM_UP = 3
ROUNDS = 4
CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 4, 16, 64)


class Decoding:
    """An engine in the middle of its work: `batch` sequences of `context` tokens, greedy, none of which ends. Their cache is
    filled with a made-up number, which changes no rate, so that any context is there at once."""

    def __init__(self, model: Transformer, context: int, batch: int, steps: int) -> None:
        limit = model.config.max_position_embeddings
        if context + steps > limit:
            raise UsageError(f"--context {context}: with {steps} measured steps it exceeds the model's context of {limit:,}")
        self.context, self.batch = context, batch
        room = batch * bytes_for(model.config, context + steps + PAGE_SIZE, model.embed_tokens.weight.dtype)
        device = model.embed_tokens.weight.device
        free = free_bytes(device)
        if device.type == "cpu" and room > 0.9 * free:  # an accelerator's allocator holds on to what is free
            raise UsageError(f"the cache of {batch} x {context:,} tokens takes {room / 2**30:,.1f} GiB, "
                             f"{free / 2**30:,.1f} GiB are free: lower --context or --batch")  # fmt: skip
        self.engine = Engine(model, cache_bytes=room, max_batch=batch, prefix_sharing=False)
        self.engine.pool.first.fill_(0.1)
        self.engine.pool.second.fill_(0.1)
        words = model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        for number in range(batch):
            prompt = torch.randint(words, (context,), generator=generator).tolist()
            sampling = Sampling(temperature=0.0)
            self.engine.add(Request(str(number), tuple(prompt), steps, sampling, ignore_eos=True))
        self.engine.scheduler.admit()
        for sequence in self.engine.scheduler.active:
            self.engine.scheduler.advance(sequence, context - 1)

    def step(self) -> float:
        """Seconds that one more token of every sequence takes."""
        start = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start


def random_model(config: ModelConfig, dtype: torch.dtype, quantization: str | None) -> Transformer:
    """A model of random weights: routing is then about even, as a balanced model's."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to(dtype).to_empty(device=default_device())
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    generator = torch.Generator(default_device()).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02, generator=generator)
            for buffer in module.buffers(recurse=False):
                buffer.zero_()
    model.requires_grad_(False).eval()
    return model if quantization is None else quantize_model(model, quantization)


def bench_decode(
    config: ModelConfig,
    *,
    context: int,
    batch: int,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    steps: int = 24,
    peer: bool = False,
    note: Note = lambda line: None,
) -> dict[str, Any]:
    """Rates of prefill (one prompt of `context` tokens) and of decoding (`batch` sequences at `context`), tokens/s.

    dtype: of weights and cache; None for the checkpoint's usual bfloat16 on a GPU or for models too large for the
    processor's caches, float32 else. weight_bytes_per_token: weights read in a step, experts that no token chose left out,
    over the tokens it makes. cache_bytes_per_token: what one position takes. bandwidth_fraction: bytes read a second over
    `memory_bandwidth`, the rate of reading one large block. With `peer`, transformers decodes the same shape in turn, in
    `dtype` and on a CPU in float32 too, since many a CPU only emulates bfloat16; `speed_ratio` and `prefill_ratio` are ours
    over its best. Raises `UsageError` for a context beyond the model's and for a cache beyond the memory.
    """
    device = default_device()
    dtype = dtype or default_dtype(config)
    total = WARM_UP + steps
    if device.type == "cpu" and must_compile():
        note("compiling the C++ kernels, once")
    note("filling random weights")
    model = random_model(config, dtype, quantization)
    decoding = Decoding(model, context, batch, total)
    others = _peers(config, dtype, context, batch, note) if peer else []
    note(f"reading a prompt of {context:,} tokens")
    prefill = _prefill_seconds(model, context)
    seconds: list[float] = []
    theirs: list[list[float]] = [[] for _ in others]
    for _ in range(WARM_UP - 1):
        decoding.step()
    before = decoding.engine.stats.expert_load
    decoding.step()
    touched = sum(new > old for pair in zip(decoding.engine.stats.expert_load, before, strict=True)
                  for new, old in zip(*pair, strict=True))  # fmt: skip
    for turn in range(ROUNDS):
        note(f"decoding, turn {turn + 1} of {ROUNDS}")
        seconds += [decoding.step() for _ in range(steps * turn // ROUNDS, steps * (turn + 1) // ROUNDS)]
        for other, took in zip(others, theirs, strict=True):
            took += [other.step() for _ in range(max(1, steps // ROUNDS // 2))]
    median = statistics.median(seconds)
    weights = weight_bytes(model, touched)
    read = weights + batch * context * decoding.engine.pool.bytes_per_token
    bandwidth = read_bytes_per_second(device)
    result: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "dtype": dtype_name(dtype),
        "quantization": quantization,
        "threads": torch.get_num_threads(),
        "kernels": why_missing() or "native" if device.type == "cpu" else "torch",
        "prefill_tokens_per_second": context / prefill,
        "decode_tokens_per_second": batch / median,
        "decode_step_seconds_median": median,
        "weight_bytes_per_token": weights / batch,
        "cache_bytes_per_token": decoding.engine.pool.bytes_per_token,
        "bytes_read_per_step": read,
        "memory_bandwidth": bandwidth,
        "bandwidth_fraction": read / median / bandwidth,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    if others:
        ways = [
            {
                **other.description,
                "prefill_tokens_per_second": context / other.prefill_seconds,
                "decode_tokens_per_second": batch / statistics.median(took),
            }
            for other, took in zip(others, theirs, strict=True)
        ]
        result |= _compared(result, ways)
    return result


def _compared(ours: dict[str, Any], ways: list[dict[str, Any]]) -> dict[str, Any]:
    """The peer's best rates over all the ways in which it ran, and ours over them."""
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    best = {rate: max(way[rate] for way in ways) for rate in rates}
    prefill, decode = (ours[rate] / best[rate] for rate in rates)
    named = {name: ways[0][name] for name in ("name", "version")}
    return {"peer": {**named, **best, "ways": ways}, "prefill_ratio": prefill, "speed_ratio": decode}


def _peers(config: ModelConfig, dtype: torch.dtype, context: int, batch: int, note: Note) -> list[PeerDecoder]:
    """The peer in `dtype`, and on a CPU in float32 if the memory holds that too."""
    peers = [PeerDecoder(config, dtype, context, batch, note)]
    wide = 4 * count(config).total_parameters
    if default_device().type == "cpu" and dtype != torch.float32:
        if wide < 0.8 * free_bytes(default_device()):
            peers.append(PeerDecoder(config, torch.float32, context, batch, note))
        else:
            note(f"transformers in float32 takes {wide / 2**30:,.1f} GiB, more than is free: left out")
    return peers


def default_dtype(config: ModelConfig) -> torch.dtype:
    """bfloat16 where bytes are what decoding waits for; float32 for a model that the processor's caches hold."""
    device = default_device()
    small = count(config).active_parameters < 2**25
    return best_dtype(device) if device.type == "cpu" and small else torch.bfloat16


def weight_bytes(model: Transformer, experts: int) -> int:
    """Bytes of all weights that one step reads, `experts` of the routed experts among them. The embedding, of which it reads
    one row a token, is left out."""
    config = model.config
    everything = routed = 0
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.startswith(("embed_tokens.", "mtp.")):
            continue
        everything += tensor.nbytes
        routed += tensor.nbytes if ".experts." in name else 0
    if config.tie_word_embeddings and not isinstance(model.lm_head, QuantizedLinear):
        everything += model.embed_tokens.weight.nbytes
    main = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    number = main * (config.n_routed_experts or 0)
    return everything - routed + (routed * experts // number if number else 0)


def sweep(config: ModelConfig, *, dtype: torch.dtype | None, note: Note, contexts: tuple[int, ...] = CONTEXTS,
          batches: tuple[int, ...] = BATCHES, steps: int = 8) -> list[dict[str, Any]]:  # fmt: skip
    """Decode rates over contexts and batches, of the model and of its twins whose caches keep keys and values: every head's
    (MHA), and of an eighth of the heads at least one (GQA). A point that does not fit into memory says so."""
    dtype = dtype or default_dtype(config)
    rows: list[dict[str, Any]] = []
    steps += WARM_UP
    longest = config.model_copy(update={"max_position_embeddings": max(contexts) + steps})
    for name, shape in twins(longest).items():
        model = random_model(shape, dtype, None)
        for context, batch in itertools.product(contexts, batches):
            note(f"{name}: context {context:,}, batch {batch}")
            row: dict[str, Any] = {"attention": name, "context": context, "batch": batch}
            try:
                decoding = Decoding(model, context, batch, steps)
            except UsageError as error:
                rows.append({**row, "reason": str(error)})
                continue
            seconds = [decoding.step() for _ in range(steps)][WARM_UP:]
            row["cache_bytes_per_token"] = decoding.engine.pool.bytes_per_token
            rows.append({**row, "decode_tokens_per_second": batch / statistics.median(seconds)})
            del decoding
    return rows


def twins(config: ModelConfig) -> dict[str, ModelConfig]:
    """The model and, if its attention is latent, the same with grouped-query attention: MHA with as many key-value heads as
    heads, GQA with an eighth of them."""
    if config.attention != "latent":
        return {"grouped": config}
    values = config.to_hf()
    for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
                 "num_key_value_heads", "architectures", "topk_method", "scoring_func", "rope_parameters"):  # fmt: skip
        values.pop(name, None)
    values["head_dim"] = config.v_head_dim
    values["model_type"] = "glm4_moe"
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_parameters.rope_theta}
    heads = config.num_attention_heads
    return {
        "latent": config,
        "MHA": ModelConfig.from_hf({**values, "num_key_value_heads": heads}, where="the MHA twin"),
        "GQA": ModelConfig.from_hf({**values, "num_key_value_heads": max(1, heads // 8)}, where="the GQA twin"),
    }


def _prefill_seconds(model: Transformer, context: int) -> float:
    """The least of two readings of a prompt: the first one warms up."""
    room = bytes_for(model.config, context + PAGE_SIZE, model.embed_tokens.weight.dtype)
    engine = Engine(model, cache_bytes=room, prefix_sharing=False)
    seconds = []
    for number in range(2):
        ids = torch.randint(model.config.vocab_size, (context,)).tolist()
        start = time.perf_counter()
        engine.run([Request(str(number), tuple(ids), 1, Sampling(temperature=0.0), ignore_eos=True)])
        seconds.append(time.perf_counter() - start)
    return min(seconds)
