"""The peer of decoding benchmarks: transformers' model of the same shape, in its fastest mode."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cadre.errors import RunError, UsageError, one_line
from cadre.kernels.limits import default_device, dtype_name, synchronize
from cadre.model.config import ModelConfig

_EXPERTS = ("grouped_mm", "batched_mm", "eager")
# A reading that takes so many seconds is not repeated: what is cold at its start no longer matters.
_LONG = 10.0


class PeerDecoder:
    """A transformers model that has read `context` tokens of `batch` sequences and decodes them greedily, token by token.

    Tries every implementation of experts on two steps and keeps the fastest; the prompt is read in two of them, twice in each.
    description: what runs. prefill_seconds: reading one prompt of `context` tokens, the best of all. Raises `UsageError`
    without transformers, `RunError` if no implementation runs.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, context: int, batch: int, note: Callable[[str], None]) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UsageError("--peer transformers: it is not installed here: pip install 'cadre-lm[test]' brings it")
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        values = config.model_copy(update={"num_nextn_predict_layers": 0}).to_hf()
        theirs = AutoConfig.for_model(values.pop("model_type"), **values)
        note("transformers: building its model")
        model = AutoModelForCausalLM.from_config(theirs, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(default_device()).eval()
        self.words, self.device = config.vocab_size, default_device()
        self.prefill_seconds = float("inf")
        self.cache: Any = None
        ways = self._running(_EXPERTS if config.has_experts else (None,))
        for way in ways[:1] + ways[-1:]:
            note(f"transformers reads a prompt of {context:,} tokens ({way or 'dense'})")
            self._use(way)
            took = self._read(1, context)
            self.prefill_seconds = min(self.prefill_seconds, took if took > _LONG else min(took, self._read(1, context)))
        if batch > 1:
            note(f"transformers reads {batch} prompts")
            self._read(batch, context)
        self.next = torch.randint(self.words, (batch, 1), device=self.device)
        steps: dict[str | None, float] = {}
        for way in ways:
            self._use(way)
            steps[way] = min(self.step(), self.step())
        best = min(steps, key=lambda way: steps[way])
        self._use(best)
        version = importlib.metadata.version("transformers")
        kind = dtype_name(dtype)
        self.description = {"name": "transformers", "version": version, "experts": best, "dtype": kind}

    @torch.inference_mode()
    def step(self) -> float:
        """Seconds that one more token of every sequence takes."""
        synchronize(self.device)
        start = time.perf_counter()
        out = self.model(self.next, past_key_values=self.cache, use_cache=True)
        self.next = out.logits[:, -1:].argmax(dim=-1)
        synchronize(self.device)
        return time.perf_counter() - start

    @torch.inference_mode()
    def _read(self, batch: int, context: int) -> float:
        ids = torch.randint(self.words, (batch, context), device=self.device)
        synchronize(self.device)
        start = time.perf_counter()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        synchronize(self.device)
        return time.perf_counter() - start

    def _running(self, ways: Sequence[str | None]) -> list[str | None]:
        """The implementations of experts that take this shape at all: `grouped_mm` wants certain widths."""
        running: list[str | None] = []
        refusal = ""
        for way in ways:
            self._use(way)
            try:
                self._read(1, 2)
                running.append(way)
            except RuntimeError as error:
                refusal = one_line(error)
        if not running:
            raise RunError(f"transformers runs this shape in none of its ways: {refusal[:300]}")
        return running

    def _use(self, way: str | None) -> None:
        if way is not None:
            self.model.set_experts_implementation(way)
